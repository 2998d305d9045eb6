"""Which split a document belongs to: decided by a hash of its id, so that more documents move none."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from pipeline_lib.config.errors import UserError
from pipeline_lib.data.documents import SPLITS

WHOLE = 2**64


@dataclass(frozen=True)
class Bounds:
    """Hashes below `test` are test documents, those from there to below `valid` validation, from there to below
    `holdout` the holdout, the rest training."""

    test: int
    valid: int
    holdout: int = 0

    def assign(self, hashes: np.ndarray) -> np.ndarray:
        """Index into SPLITS for each uint64 hash; int8 of the same shape."""
        found = np.full(hashes.shape, SPLITS.index("train"), np.int8)
        # Compared with the last hash that belongs to a split: an upper bound of 2**64 fits no uint64.
        for name, bound in (("holdout", self.holdout), ("valid", self.valid), ("test", self.test)):
            if bound > 0:
                found[hashes <= np.uint64(bound - 1)] = SPLITS.index(name)
        return found


def hashes(keys: Iterable[str], seed: int) -> np.ndarray:
    """The first 64 bits of SHA-256 over 'seed:key' for each key; uint64 [n]."""
    digests = b"".join(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:8] for key in keys)
    return np.frombuffer(digests, ">u8").astype(np.uint64)


def names(split: dict[str, float | int]) -> tuple[str, ...]:
    """The splits that a dataset has."""
    return SPLITS if split.get("holdout") else SPLITS[:3]


def shares(split: dict[str, float | int]) -> Bounds | None:
    """The bounds of a split that is given in shares; None when a part of it is a number of documents."""
    if any(isinstance(size, int) and size > 0 for size in split.values()):
        return None
    end_of_valid = min(_share(split["test"]) + _share(split["valid"]), WHOLE)
    return Bounds(_share(split["test"]), end_of_valid, _end_of_holdout(split, end_of_valid))


def counted(split: dict[str, float | int], batches: Iterable[np.ndarray], where: str) -> Bounds:
    """The bounds of a split that is given (partly) in numbers of documents, from the hashes of all documents.

    Memory is bounded by the numbers asked for. What may not be divided counts as one.

    Raises:
        UserError: there are not more documents than asked for.
    """
    test, valid = (split[name] if isinstance(split[name], int) else None for name in ("test", "valid"))
    start = 0 if test is not None else _share(split["test"])
    needed = int((test or 0) + (valid or 0)) + 1
    smallest = np.empty(0, np.uint64)
    for batch in batches:
        smallest = np.unique(np.concatenate([smallest, batch[batch >= np.uint64(start)]]))[:needed]
    if len(smallest) < needed:
        raise UserError(
            f"has only {len(smallest)} documents to divide", where=where, value=split, fix="make `split` smaller"
        )
    end_of_test = int(smallest[int(test)]) if test is not None else start
    end_of_valid = int(smallest[needed - 1]) if valid is not None else min(end_of_test + _share(split["valid"]), WHOLE)
    return Bounds(end_of_test, end_of_valid, _end_of_holdout(split, end_of_valid))


def _end_of_holdout(split: dict[str, float | int], end_of_valid: int) -> int:
    share = split.get("holdout", 0)
    return min(end_of_valid + _share(share), WHOLE) if share else 0


def _share(share: float | int) -> int:
    return min(int(share * WHOLE), WHOLE)
