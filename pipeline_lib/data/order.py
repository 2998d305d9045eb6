"""The order in which sequences are read: a permutation for each epoch, known by the seed alone."""

from __future__ import annotations

import hashlib

import numpy as np

ROUNDS = 6


class SequenceOrder:
    """A pseudo-random permutation of `n_sequences` sequences for each epoch; O(1) memory.

    A balanced Feistel network permutes the numbers below the next power of 4, and numbers that land at
    or above `n_sequences` go through it again until they do not ("cycle walking": J. Black, P. Rogaway,
    Ciphers with Arbitrary Finite Domains, CT-RSA 2002). The round function is the finaliser of SplitMix64
    (G. Steele, D. Lea, C. Flood, OOPSLA 2014); its keys are SHA-256 of seed, epoch and round.
    """

    def __init__(self, n_sequences: int, seed: int) -> None:
        if n_sequences < 1:
            raise ValueError(f"n_sequences must be at least 1, got {n_sequences}")
        self.n_sequences, self.seed = n_sequences, seed
        self._half = max(1, ((n_sequences - 1).bit_length() + 1) // 2)

    def index(self, i: int) -> int:
        """Which sequence comes at place `i` of the endless stream; its epoch is i // n_sequences."""
        return int(self.indices(np.array([i]))[0])

    def indices(self, i: np.ndarray) -> np.ndarray:
        """`index` of each of `i`; int64 [n] → int64 [n]."""
        epochs, places = np.divmod(i.astype(np.int64), self.n_sequences)
        found = np.empty(len(i), np.int64)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            found[chosen] = self._permute(places[chosen].astype(np.uint64), self._keys(int(epoch))).astype(np.int64)
        return found

    def _keys(self, epoch: int) -> list[np.uint64]:
        digests = (hashlib.sha256(f"sequence order:{self.seed}:{epoch}:{r}".encode()).digest() for r in range(ROUNDS))
        return [np.uint64(int.from_bytes(digest[:8], "big")) for digest in digests]

    def _permute(self, places: np.ndarray, keys: list[np.uint64]) -> np.ndarray:
        result = self._feistel(places, keys)
        outside = np.flatnonzero(result >= self.n_sequences)
        while len(outside):
            result[outside] = self._feistel(result[outside], keys)
            outside = outside[result[outside] >= self.n_sequences]
        return result

    def _feistel(self, values: np.ndarray, keys: list[np.uint64]) -> np.ndarray:
        half, mask = np.uint64(self._half), np.uint64((1 << self._half) - 1)
        left, right = values >> half, values & mask
        for key in keys:
            left, right = right, left ^ (_mix(right + key) & mask)
        return left << half | right


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64; uint64 arithmetic that wraps."""
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)
