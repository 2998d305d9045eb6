"""Text to calibrate on: a dataset, or a teacher's records, as token sequences of one length."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline_lib.config.errors import UserError
from pipeline_lib.data.records import RECORDS, read_records

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

CANDIDATES = 10
"""Texts that are looked at, for each that is wanted: long ones may be left out."""


def texts(artifact: Path, columns: Sequence[str] = ()) -> Iterator[tuple[str, str | list[int]]]:
    """(id, text) of the training documents of a dataset artifact, or (id, tokens) of a teacher's records.

    Args:
        columns: of the dataset, put below the text of each document.

    Raises:
        UserError: the artifact is neither, or has no such columns.
    """
    if (artifact / RECORDS).is_file():
        for record in read_records(artifact):
            yield str(record["id"]), record["prompt_ids"] + record["completion_ids"]
        return
    files = sorted(artifact.glob("train-*.parquet"))
    if not files:
        raise UserError(
            "no text to calibrate on",
            where=str(artifact),
            allowed=f"{RECORDS} or train-*.parquet",
            fix="name a dataset",
        )
    import pyarrow.parquet as pq

    for path in files:
        file = pq.ParquetFile(path)
        missing = sorted(set(columns) - set(file.schema_arrow.names))
        if missing:
            raise UserError(
                "no such column", where=str(path), value=missing, allowed=file.schema_arrow.names,
                fix="name it in `columns:` of the dataset's source",
            )  # fmt: skip
        for batch in file.iter_batches(columns=["id", "text", *columns]):
            for row in batch.to_pylist():
                yield row["id"], "\n".join(str(row[name]) for name in ("text", *columns))


def sequences(
    artifact: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    columns: Sequence[str] = (),
    samples: int,
    max_tokens: int,
    long: str,
    length: int,
    seed: int,
) -> list[torch.Tensor]:
    """Token sequences of `length`, made of the first texts in seeded order one after the other.

    Args:
        columns: see `texts`.
        samples: texts to take.
        max_tokens: a text of more tokens is cut there, or left out where `long` is "skip".
        length: of a sequence; what does not fill one is dropped, unless there is no other.
        seed: of the order.

    Returns:
        int64 [length] each.

    Raises:
        UserError: no text is left.
    """
    import torch

    def place(item: tuple[str, str | list[int]]) -> bytes:
        return hashlib.sha256(f"{seed}:{item[0]}".encode()).digest()

    found = heapq.nsmallest(CANDIDATES * samples, texts(artifact, columns), key=place)
    stream: list[int] = []
    taken = 0
    for _, text in found:
        ids: Any = tokenizer(text.strip())["input_ids"] if isinstance(text, str) else text
        if not ids or (len(ids) > max_tokens and long == "skip"):
            continue
        stream += ids[:max_tokens]
        taken += 1
        if taken == samples:
            break
    if len(stream) < 2:
        raise UserError(
            "no text to calibrate on is left",
            where=str(artifact),
            value=f"{len(found)} texts, each of more than {max_tokens} tokens",
            fix="raise clip.max_tokens, or set clip.long to cut",
        )
    whole = max(len(stream) // length, 1)
    tokens = torch.tensor(stream)
    return [tokens[i * length : (i + 1) * length] for i in range(whole)]
