"""Documents to token shards: [bos] tokens [eos] of one document after another, one stream a split.

A shard is a safetensors file: `tokens` (uint16, or uint32 for more than 65,536 entries) [n] and
`document_starts` (int64) [documents], the places of the documents' first tokens in this shard. Shards end
between documents; the stream goes on in the next one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from safetensors.numpy import save_file

from pipeline_lib.artifacts.files import read_json, sha256_file, sync, write_json
from pipeline_lib.artifacts.job import Job
from pipeline_lib.artifacts.progress import Progress, say
from pipeline_lib.config.errors import UserError
from pipeline_lib.data import tokenizer as tokenizers
from pipeline_lib.data.documents import SPLITS, place

SHARD_TOKENS = 2**25  # a shard ends with the row group in which it reaches this: 64 or 128 MiB


@dataclass
class Shard:
    """A finished shard.

    Attributes:
        row_groups: how many row groups of the split had been read when it ended.
        last: nothing comes after it.
    """

    file: str
    tokens: int
    documents: int
    sha256: str
    row_groups: int
    last: bool


def build(job: Job) -> None:
    """Make the tokens artifact; finished shards in `job.work` are used again if they are whole."""
    tokenizer, info = tokenizers.load(job.inputs["tokenizer"])
    # Rayon's threads divide the documents of a row group; what comes back is in their order.
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    if job.execution.get("threads"):
        os.environ["RAYON_NUM_THREADS"] = str(job.execution["threads"])
    dtype = np.dtype(np.uint16 if info["vocab_size"] <= 2**16 else np.uint32)
    shards: dict[str, list[Shard]] = {}
    sizes = read_json(job.inputs["dataset"] / "dataset.json")["result"]["bytes"]
    with Progress("tokens", sum(sizes.values()), "B") as progress:
        for split in (name for name in SPLITS if name in sizes):
            limit = job.settings["max_tokens"] if split == "train" else None
            groups = _RowGroups(sorted(job.inputs["dataset"].glob(f"{split}-*.parquet")))
            packer = _Packer(tokenizer, info, dtype, job.work / "shards", split, limit, progress)
            shards[split] = packer.run(groups)
    _publish(job, info, dtype, shards)


class _RowGroups:
    """The row groups of a split's files, by one running number."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files
        counts = [pq.read_metadata(path).num_row_groups for path in files]
        self._ends = np.cumsum(counts, dtype=np.int64)
        self.count = sum(counts)

    def texts(self, index: int) -> list[str]:
        """The documents of row group `index`."""
        number = int(np.searchsorted(self._ends, index, side="right"))
        first = int(self._ends[number - 1]) if number else 0
        with pq.ParquetFile(self.files[number]) as file:
            return file.read_row_group(index - first, columns=["text"])["text"].to_pylist()


@dataclass
class _Packer:
    tokenizer: Any
    info: dict[str, Any]
    dtype: np.dtype[Any]
    work: Path
    split: str
    limit: int | None
    progress: Progress

    def run(self, groups: _RowGroups) -> list[Shard]:
        """The shards of the split: those that are there and whole, then the rest."""
        shards = list(self._kept())
        while groups.count and not (shards and shards[-1].last):
            shards.append(self._make(groups, shards))
        return shards

    def _kept(self) -> Iterator[Shard]:
        for number in range(10**5):
            record = self.work / f"{self._name(number)}.json"
            if not record.exists():
                return
            shard = Shard(**read_json(record))
            path = self.work / shard.file
            if not path.exists() or sha256_file(path) != shard.sha256:
                say(f"{path} is damaged and is made again")
                return
            yield shard
            if shard.last:
                return

    def _name(self, number: int) -> str:
        return f"{self.split}-{number:05d}"

    def _make(self, groups: _RowGroups, before: list[Shard]) -> Shard:
        had = sum(shard.tokens for shard in before)
        left = None if self.limit is None else self.limit - had
        position = before[-1].row_groups if before else 0
        streams, starts, count, full = [], [], 0, False
        while position < groups.count and count < SHARD_TOKENS and not full:
            stream, begins, full = self._encode(groups.texts(position), None if left is None else left - count)
            streams.append(stream)
            starts.append(begins + count)
            count += len(stream)
            position += 1
        arrays = {"tokens": np.concatenate(streams), "document_starts": np.concatenate(starts)}
        name = self._name(len(before))
        _save(arrays, self.work / f"{name}.safetensors")
        digest = sha256_file(self.work / f"{name}.safetensors")
        last = full or position == groups.count
        shard = Shard(f"{name}.safetensors", count, len(arrays["document_starts"]), digest, position, last)
        write_json(self.work / f"{name}.json", vars(shard))
        return shard

    def _encode(self, texts: list[str], left: int | None) -> tuple[np.ndarray, np.ndarray, bool]:
        """(stream, document starts int64, whether `left` tokens were reached) of one row group.

        Stops after the document that reaches `left`: the last document is whole.
        """
        bos, eos = self.info["bos"], self.info["eos"]
        pieces, starts, count = [], [], 0
        encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        self.progress.update(sum(len(text.encode()) for text in texts))
        for encoding in encodings:
            starts.append(count)
            pieces.append(np.array([bos, *encoding.ids, eos], self.dtype))
            count += len(pieces[-1])
            if left is not None and count >= left:
                break
        return np.concatenate(pieces), np.array(starts, np.int64), left is not None and count >= left


def _save(arrays: dict[str, np.ndarray], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    save_file(arrays, temporary)
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync(path.parent)


def _publish(job: Job, info: dict[str, Any], dtype: np.dtype[Any], shards: dict[str, list[Shard]]) -> None:
    counts = {split: sum(shard.tokens for shard in shards[split]) for split in shards}
    limit = job.settings["max_tokens"]
    if counts["train"] == 0:
        raise UserError("no tokens for training", where="tokens", value=counts, fix="give a dataset with a train split")
    if limit is not None and counts["train"] < limit:
        say(f"the dataset holds {counts['train']} training tokens, less than the {limit} asked for: they are repeated")
    for found in shards.values():
        for shard in found:
            place(job.work / "shards" / shard.file, job.out / shard.file)
    say(", ".join(f"{split} {counts[split]} tokens" for split in shards))
    result = {
        **info,
        "dtype": dtype.name,
        "tokens": counts,
        "documents": {split: sum(shard.documents for shard in shards[split]) for split in shards},
        "shards": {
            split: [{key: getattr(shard, key) for key in ("file", "tokens", "documents", "sha256")} for shard in found]
            for split, found in shards.items()
        },
    }
    write_json(job.out / "tokens.json", {"result": result, "provenance": {}})
