"""Packed codes: the layout, and back again."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline_lib.numerics.packing import pack, packed_width, unpack


@given(st.integers(1, 8), st.integers(1, 70), st.integers(1, 3), st.integers(0, 2**31))
def test_round_trip_and_layout(bits: int, count: int, rows: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (rows, count), generator=torch.Generator().manual_seed(seed))
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, packed_width(count, bits))
    assert torch.equal(unpack(packed, bits, count).long(), codes)
    for row, stream in zip(codes.tolist(), packed.tolist(), strict=True):
        whole = int.from_bytes(bytes(stream), "little")
        assert whole == sum(code << bits * i for i, code in enumerate(row)), "the first code in the lowest bits"


def test_words_hold_16_codes_of_2_bits() -> None:
    """Element k of a row lies in word k // 16, at bits 2 (k % 16)."""
    codes = torch.randint(0, 4, (5, 96))
    words = pack(codes, 2).view(torch.int32).long() & 0xFFFFFFFF
    for k in range(96):
        assert torch.equal(words[:, k // 16] >> 2 * (k % 16) & 3, codes[:, k])


def test_leading_dimensions() -> None:
    codes = torch.randint(0, 8, (2, 3, 11))
    assert torch.equal(unpack(pack(codes, 3), 3, 11), codes.to(torch.uint8))


def test_bits_out_of_range() -> None:
    with pytest.raises(ValueError, match="1 to 8 bits"):
        pack(torch.zeros(1, 4), 9)
