"""Losses as NoTrainNoGain publishes them: pickles `dict_chunk_*.pkl` of {number of the sequence: loss}.

A pickle is a program. These are read by an unpickler that knows no name to call, so that nothing but numbers and
containers can come of it, and what comes of it is checked.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pipeline_lib.config.errors import UserError
from pipeline_lib.data.example_losses import ExampleLosses, digest_of, sequence_count, sequences_digest
from pipeline_lib.data.tokens import TokenShards

_CHUNK = re.compile(r"dict_chunk_(\d+)\.pkl")
ROWS = 10_000
SPLIT_SEED = 0


class _Numbers(pickle.Unpickler):
    """Refuses every global: no class is looked up, nothing is called."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        raise pickle.UnpicklingError(f"it names {module_name}.{global_name}, and losses need no names")

    def persistent_load(self, pid: Any, /) -> Any:
        raise pickle.UnpicklingError("it refers to something outside of the file")


def read_pickles(folder: Path) -> np.ndarray:
    """The losses of sequences 0 … n-1 from all chunks of a folder; float32 [n].

    Raises:
        UserError: no chunks, a pickle that holds anything but numbers, or sequences that are missing or there twice.
    """
    chunks = sorted((int(m[1]), path) for path in folder.glob("*.pkl") if (m := _CHUNK.fullmatch(path.name)))
    if not chunks or [number for number, _ in chunks] != list(range(len(chunks))):
        raise UserError(
            "the chunks of the losses are not all there",
            where=str(folder),
            value=[path.name for _, path in chunks],
            allowed="dict_chunk_0.pkl, dict_chunk_1.pkl, …",
            fix="give the folder examples_to_loss of the published losses",
        )
    numbers, losses = [], []
    for _, path in chunks:
        found = _chunk(path)
        numbers.append(np.fromiter(found.keys(), np.int64, len(found)))
        losses.append(np.fromiter(found.values(), np.float64, len(found)))
    every, values = np.concatenate(numbers), np.concatenate(losses)
    order = np.argsort(every, kind="stable")
    if not np.array_equal(every[order], np.arange(len(every))):
        raise UserError(
            "sequences are missing, or there twice",
            where=str(folder),
            value=f"{len(every)} losses of {len(np.unique(every))} sequences, the last {every.max()}",
            allowed="each of 0, 1, 2, … once",
            fix="get the files again",
        )
    return values[order].astype(np.float32)


def _chunk(path: Path) -> dict[int, float]:
    try:
        with open(path, "rb") as file:
            found = _Numbers(file).load()
    except Exception as error:
        # A damaged pickle can raise nearly anything; whatever it is, the file is refused.
        raise UserError(
            f"the pickle is not read: {error}",
            where=str(path),
            allowed="a dict of numbers",
            fix="do not trust this file",
        ) from None
    if type(found) is not dict or not found:
        raise UserError(
            "not a dict of losses", where=str(path), value=type(found).__name__, fix="get the published files again"
        )
    for number, loss in found.items():
        if type(number) is not int or not 0 <= number < 2**63 or type(loss) is not float or not math.isfinite(loss):
            raise UserError(
                "not a number of a sequence and its loss",
                where=str(path),
                value=f"{number!r:.40}: {loss!r:.40}",
                allowed="whole numbers from 0 on, and finite floats",
                fix="get the published files again",
            )
    return found


def prepared_digest(folder: Path, seq_len: int, holdout: float | None) -> tuple[str, int]:
    """(`sequences_digest`, number) of the training sequences of a prepared dataset, as NoTrainNoGain reads it.

    Args:
        folder: what `datasets.Dataset.save_to_disk` left, with a column `input_ids`.
        holdout: share that is split off for the model behind the losses; None where the folder has been split.

    Raises:
        UserError: no such dataset, or sequences of another length.
    """
    import datasets

    try:
        rows: Any = datasets.load_from_disk(str(folder)).select_columns(["input_ids"]).with_format("numpy")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(
            f"no prepared dataset: {error}",
            where=str(folder),
            allowed="a folder written by save_to_disk, with a column input_ids",
            fix="give the folder that the losses were measured on",
        ) from None

    kept = np.arange(len(rows)) if holdout is None else _kept(len(rows), holdout)

    def pieces() -> Iterator[np.ndarray]:
        for first in range(0, len(kept), ROWS):
            ids = np.asarray(rows[kept[first : first + ROWS]]["input_ids"])
            if ids.ndim != 2 or ids.shape[1] != seq_len:
                raise UserError(
                    "the prepared sequences have another length", where=str(folder), value=list(ids.shape[1:]),
                    allowed=str(seq_len), fix="give the --seq-len that they were prepared with",
                )  # fmt: skip
            yield ids

    return digest_of(seq_len, pieces()), len(kept)


def _kept(rows: int, holdout: float) -> np.ndarray:
    """The training rows of `datasets.Dataset.train_test_split`, which itself would write beside the user's files."""
    return np.random.default_rng(SPLIT_SEED).permutation(rows)[math.ceil(holdout * rows) :]


def matched(loss_N: np.ndarray, shards: TokenShards, seq_len: int, digest: str, where: str) -> ExampleLosses:
    """The losses of the training sequences of `shards`, which must be the ones that they were measured on.

    A stream that ends with a whole sequence holds one more than is trained on, which wants a next token: its loss is
    left out.

    Args:
        digest: hex SHA-256 of the sequences behind the losses: seq_len and all token ids, little-endian uint32.

    Raises:
        UserError: the digest, or the number of sequences, is another.
    """
    trained, measured = sequence_count(shards, seq_len), len(loss_N)
    own = "nothing to compare"
    if measured in (trained, trained + 1) and measured * seq_len <= shards.n_tokens:
        own = sequences_digest(shards, seq_len, measured)
    if own != digest:
        raise UserError(
            "the losses were measured on other sequences than these tokens hold",
            where=where,
            value=f"{measured} losses, digest {digest}",
            allowed=f"{trained} sequences, digest {own}",
            fix="losses go with one dataset, tokenizer and split: measure them anew with `losses: <experiment>`",
        )
    kept = sequences_digest(shards, seq_len)
    return ExampleLosses(loss_N[:trained], seq_len, kept, {"seed": None, "rate": None})
