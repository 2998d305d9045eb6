"""Codes of a few bits, packed into bytes: least significant bits first, each row by itself."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def packed_width(count: int, bits: int) -> int:
    """Bytes that a row of `count` codes of `bits` bits takes."""
    return -(-count * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """The stream of bits of each row, as bytes.

    Bit b of code i is bit `i * bits + b` of its row, so that read as little-endian words of any width the codes
    lie one after the other, the first in the lowest bits. What the last byte has left is zero.

    Args:
        codes: [..., n], values 0 … 2^bits - 1 of any dtype.
        bits: 1 to 8.

    Returns:
        uint8 [..., ceil(n * bits / 8)].
    """
    per_unit, size, dtype = _unit(bits)
    count = codes.shape[-1]
    units = -(-count // per_unit)
    codes = torch.nn.functional.pad(codes.to(dtype), (0, units * per_unit - count)).unflatten(-1, (units, per_unit))
    word = codes[..., 0].clone()
    for i in range(1, per_unit):
        word |= codes[..., i] << (i * bits)
    if size == 1:
        return word
    spread = word[..., None] >> torch.arange(0, 8 * size, 8, device=word.device)
    return (spread & 0xFF).to(torch.uint8).flatten(-2)[..., : packed_width(count, bits)].contiguous()


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack`: uint8 [..., count].

    Args:
        packed: uint8 [..., ceil(count * bits / 8)].
    """
    per_unit, size, dtype = _unit(bits)
    units = -(-count // per_unit)
    if size == 1:
        word = packed
    else:
        padded = torch.nn.functional.pad(packed.to(dtype), (0, units * size - packed.shape[-1]))
        word = (padded.unflatten(-1, (units, size)) << torch.arange(0, 8 * size, 8, device=packed.device)).sum(-1)
    shifts = torch.arange(0, per_unit * bits, bits, device=packed.device, dtype=dtype)
    codes = (word[..., None] >> shifts) & ((1 << bits) - 1)
    return codes.to(torch.uint8).flatten(-2)[..., :count]


def _unit(bits: int) -> tuple[int, int, torch.dtype]:
    """The smallest run of codes that fills whole bytes: codes, bytes, and a dtype that holds it."""
    if not 1 <= bits <= 8:
        raise ValueError(f"codes have 1 to 8 bits, not {bits}")
    whole = math.lcm(bits, 8)
    return whole // bits, whole // 8, torch.uint8 if whole == 8 else torch.int64
