"""Token shards, memory-mapped, and the batches that training reads from them."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline_lib.artifacts.files import read_json
from pipeline_lib.config.errors import UserError
from pipeline_lib.data.order import SequenceOrder

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["BatchLoader", "SequenceOrder", "TokenShards"]


class TokenShards:
    """One split of a tokens artifact as a single stream of tokens.

    Attributes:
        n_tokens: length of the stream.
        vocab_size, bos, eos, pad: as in tokens.json.
    """

    def __init__(self, artifact: Path, split: str) -> None:
        """Map the shards of `split`.

        Raises:
            UserError: no such split; a shard is missing, or its size is not the one in tokens.json.
        """
        self.artifact, self.split = artifact, split
        self.info: dict[str, Any] = read_json(artifact / "tokens.json")["result"]
        self.vocab_size: int = self.info["vocab_size"]
        self.bos, self.eos, self.pad = (self.info[role] for role in ("bos", "eos", "pad"))
        if split not in self.info["shards"]:
            raise UserError(
                "the tokens have no such split",
                where=str(artifact),
                value=split,
                allowed=list(self.info["shards"]),
                fix=f"give the dataset's `split` a `{split}`",
            )
        self._files = [artifact / shard["file"] for shard in self.info["shards"][split]]
        lengths = [shard["tokens"] for shard in self.info["shards"][split]]
        self._shards = [self._map(path, "tokens") for path in self._files]
        for path, shard, length in zip(self._files, self._shards, lengths, strict=True):
            if len(shard) != length:
                raise _damaged(path, f"{len(shard)} tokens instead of {length}")
        self._starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        self.n_tokens = int(self._starts[-1])

    def _map(self, path: Path, name: str) -> np.ndarray:
        """A tensor of a safetensors file, mapped: 8 bytes of header length, JSON header, data."""
        try:
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length)) if length < 2**20 else {}
            entry = header[name]
            dtype = {"U16": "<u2", "U32": "<u4", "I64": "<i8"}[entry["dtype"]]
            begin = 8 + length + entry["data_offsets"][0]
            if path.stat().st_size != 8 + length + max(e["data_offsets"][1] for e in header.values()):
                raise ValueError("its size is not the one in its header")
            count = entry["shape"][0]
            return np.memmap(path, dtype, "r", begin, (count,)) if count else np.empty(0, dtype)
        except (OSError, ValueError, KeyError) as error:
            raise _damaged(path, str(error)) from None

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens start … start+count-1 of the stream; uint16 or uint32 [count], a view where one shard holds them."""
        if not 0 <= start <= start + count <= self.n_tokens:
            raise IndexError(f"tokens {start}…{start + count} of {self.n_tokens}")
        parts, shard = [], int(np.searchsorted(self._starts, start, side="right")) - 1
        while count:
            offset = start - int(self._starts[shard])
            parts.append(self._shards[shard][offset : offset + count])
            start, count, shard = start + len(parts[-1]), count - len(parts[-1]), shard + 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts) if parts else np.empty(0, np.uint16)

    @cached_property
    def document_starts(self) -> np.ndarray:
        """Place in the stream of each document's first token, ascending; int64 [documents]."""
        starts = [self._map(path, "document_starts") + self._starts[i] for i, path in enumerate(self._files)]
        return np.concatenate(starts) if starts else np.empty(0, np.int64)

    def documents(self, start: int, count: int) -> np.ndarray:
        """Which document each of `count` tokens from `start` belongs to; int64 [count], for attention masks."""
        return np.searchsorted(self.document_starts, np.arange(start, start + count), side="right") - 1


def _damaged(path: Path, why: str) -> UserError:
    return UserError(
        f"the token shard is damaged: {why}", where=str(path), fix="give the snakemake command again: it is made again"
    )


class BatchLoader:
    """Batches of sequences in an order that depends on nothing but the seed.

    Sequence k is the window of seq_len + 1 tokens from token k·seq_len on: its inputs are the first seq_len,
    its labels the last, so that every token but the first of the stream is a label once an epoch. Global batch
    `step` holds the places step·global_batch … of the order; a rank takes its part of it by `first` and `count`,
    so neither ranks, micro-batches nor accumulation change what is read. `step` is the whole position:
    there is no other state to save.
    """

    def __init__(self, shards: TokenShards, seq_len: int, global_batch: int, seed: int) -> None:
        """Raises UserError: the split has fewer tokens than one sequence needs."""
        self.shards, self.seq_len, self.global_batch = shards, seq_len, global_batch
        self.n_sequences = (shards.n_tokens - 1) // seq_len
        if self.n_sequences < 1:
            raise UserError(
                f"the {shards.split} split has {shards.n_tokens} tokens, fewer than a sequence needs",
                where=str(shards.artifact),
                value=seq_len + 1,
                fix="use a larger dataset, another split or a smaller seq_len",
            )
        self.order = SequenceOrder(self.n_sequences, seed)

    def sequence(self, k: int) -> np.ndarray:
        """Sequence `k`; uint16 or uint32 [seq_len + 1]."""
        return self.shards.read(k * self.seq_len, self.seq_len + 1)

    def sequences(self, step: int, first: int, count: int) -> np.ndarray:
        """Numbers of the sequences first … first+count-1 of the global batch of `step`; int64 [count]."""
        if not 0 <= first <= first + count <= self.global_batch:
            raise IndexError(f"sequences {first}…{first + count} of a global batch of {self.global_batch}")
        return self.order.indices(step * self.global_batch + first + np.arange(count))

    def batch(self, step: int, first: int, count: int) -> tuple[Tensor, Tensor]:
        """(inputs, labels) of sequences first … first+count-1 of the global batch of `step`; int64 [count, seq_len]."""
        import torch

        windows = np.stack([self.sequence(int(k)) for k in self.sequences(step, first, count)]).astype(np.int64)
        window_BT = torch.from_numpy(windows)
        return window_BT[:, :-1].contiguous(), window_BT[:, 1:].contiguous()

    def documents(self, step: int, first: int, count: int) -> Tensor:
        """The document of each input token of `batch`; int64 [count, seq_len]. Differs where a document ends."""
        import torch

        rows = [self.shards.documents(int(k) * self.seq_len, self.seq_len) for k in self.sequences(step, first, count)]
        return torch.from_numpy(np.stack(rows))
