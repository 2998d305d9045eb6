"""Philox4x32: a counter-based random function, four 32-bit words of a 128-bit counter and a 64-bit key.

Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). One round maps (c0, c1, c2, c3) to
(hi(M1 c2) ^ c1 ^ k0, lo(M1 c2), hi(M0 c0) ^ c3 ^ k1, lo(M0 c0)) and then adds the Weyl constants to the key.

Three forms of one function: on torch tensors (the definition; traceable), on numpy arrays (fast on a CPU) and on
Python integers (fast for a single value).
"""

from __future__ import annotations

import sys
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

M0, M1 = 0xD2511F53, 0xCD9E8D57
W0, W1 = 0x9E3779B9, 0xBB67AE85
LOW = 0xFFFFFFFF
ROUNDS = 10

if sys.byteorder != "little":  # the numpy form reads the halves of a 64-bit product in place
    raise ImportError("Errata's fault streams need a little-endian machine")


def philox4x32(
    c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, k0: Tensor, k1: Tensor, rounds: int = ROUNDS
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32 on int64 tensors that hold values in [0, 2^32); they broadcast. Four int64 tensors of such values."""
    for _ in range(rounds):
        (high0, low0), (high1, low1) = _product(c0, M0), _product(c2, M1)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + W0) & LOW, (k1 + W1) & LOW
    return c0, c1, c2, c3


def _product(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a product of 32-bit values, by halves: compiled code must not overflow an int64."""
    low, high = (a & 0xFFFF) * b, (a >> 16) * b
    return (high + (low >> 16)) >> 16, (low + ((high & 0xFFFF) << 16)) & LOW


def philox4x32_int(
    c0: int, c1: int, c2: int, c3: int, k0: int, k1: int, rounds: int = ROUNDS
) -> tuple[int, int, int, int]:
    """Philox4x32 on Python integers in [0, 2^32)."""
    for _ in range(rounds):
        product0, product1 = c0 * M0, c2 * M1
        c0, c1, c2, c3 = (product1 >> 32) ^ c1 ^ k0, product1 & LOW, (product0 >> 32) ^ c3 ^ k1, product0 & LOW
        k0, k1 = (k0 + W0) & LOW, (k1 + W1) & LOW
    return c0, c1, c2, c3


_WEYL = (np.arange(ROUNDS, dtype=np.uint64)[:, None, None] * np.array([[W0], [W1]], np.uint64)).astype(np.uint32)


def philox4x32_numpy(even: np.ndarray, odd: np.ndarray, key: int) -> tuple[np.ndarray, np.ndarray]:
    """Philox4x32-10 on numpy arrays, written for few calls into numpy.

    Args:
        even: uint64 [2, n] contiguous, counter words 0 and 2 with zero upper halves; overwritten.
        odd: uint32 [2, n], counter words 1 and 3; kept.
        key: the 64-bit key as an integer (negative ones modulo 2^64).

    Returns:
        uint32 [2, n] words 0 and 2, and uint32 [2, n] words 1 and 3, both strided.
    """
    n = even.shape[1]
    keys = _WEYL + np.array([[key & LOW], [key >> 32 & LOW]], np.uint32)
    flat, multipliers = even.reshape(-1), _multipliers(n)
    even_low = even.view(np.uint32)[:, ::2]
    # Two buffers in turn: the low halves of a round's products are the odd words of the next round.
    products = np.empty((2, 2 * n), np.uint64)
    halves = products.view(np.uint32).reshape(2, 2, n, 2)[:, ::-1]
    turns = [(products[i], halves[i, :, :, 0], halves[i, :, :, 1]) for i in (0, 1)]
    for i in range(ROUNDS):
        product, low, high = turns[i & 1]
        np.multiply(flat, multipliers, out=product)
        np.bitwise_xor(high, odd, out=even_low)
        np.bitwise_xor(even_low, keys[i], out=even_low)
        odd = low
    return even_low, odd


@lru_cache(maxsize=64)
def _multipliers(n: int) -> np.ndarray:
    return np.repeat(np.array([M0, M1], np.uint64), n)


def split_key(key: Tensor) -> tuple[Tensor, Tensor]:
    """The two 32-bit halves of an int64 key tensor, as int64 tensors in [0, 2^32)."""
    return key & LOW, (key >> 32) & LOW


def as_signed(value: int) -> int:
    """A 64-bit pattern as the Python integer that an int64 tensor would show."""
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


def int64(value: int, like: Tensor) -> Tensor:
    """A 0-d int64 tensor on the device of `like`."""
    return torch.full((), value, dtype=torch.int64, device=like.device)
