"""Which bits flip: groups and single bits, exactly, in every dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline_lib.config.errors import UserError
from pipeline_lib.transforms.base import Draw
from pipeline_lib.transforms.bitflip.faults import BitFlips
from pipeline_lib.transforms.bitflip.settings import Operand

INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
FRACTION = {torch.float32: 23, torch.bfloat16: 7, torch.float16: 10}
ROWS, FEATURES = 64, 4096


def flipped(dtype: torch.dtype, **operand: Any) -> torch.Tensor:
    """The mask of flips, as integers of the dtype's width, of [64, 4096] elements."""
    x = torch.randn(ROWS, FEATURES, generator=torch.Generator().manual_seed(0)).to(dtype)
    draw = Draw(*(torch.tensor(value) for value in (12345, 0, 0)))
    faulty = BitFlips({"weight": Operand.model_validate(operand)})(x, "weight", draw)
    width = INTEGERS[dtype]
    return (x.view(width) ^ faulty.view(width)).to(torch.int64) & 2 ** (8 * dtype.itemsize) - 1


@pytest.mark.parametrize("dtype", INTEGERS)
def test_sign_and_exponent_are_one_group_and_the_fraction_the_other(dtype: torch.dtype) -> None:
    """9 + 23, 9 + 7 and 6 + 10 bits; the source counts bf16 as 8 + 8 when it measures."""
    fraction = 2 ** FRACTION[dtype] - 1
    assert (flipped(dtype, p_frac=1.0) == fraction).all()
    assert (flipped(dtype, p_exp=1.0) == 2 ** (8 * dtype.itemsize) - 1 - fraction).all()


@pytest.mark.parametrize("dtype", INTEGERS)
def test_a_single_bit_flips_alone(dtype: torch.dtype) -> None:
    for bit in range(8 * dtype.itemsize):
        assert (flipped(dtype, bits={bit: 1.0}) == 1 << bit).all()
        rest = 2 ** (8 * dtype.itemsize) - 1 - (1 << bit)
        assert (flipped(dtype, p=1.0, bits={bit: 0.0}) == rest).all()


def test_every_bit_has_its_own_rate() -> None:
    """Within 5 standard deviations each; bits that are not named keep their group's, to which those of equal p add."""
    wanted = {31: 0.02, 30: 0.3, 23: 1e-3, 22: 0.9, 5: 0.02}
    masks = flipped(torch.float32, p_exp=2**-8, p_frac=0.0, bits=wanted)
    n = ROWS * FEATURES
    for bit in range(32):
        p = wanted.get(bit, 2**-8 if bit > 22 else 0.0)
        count = int((masks >> bit & 1).sum())
        assert abs(count - n * p) <= 5 * (n * p * (1 - p)) ** 0.5, bit
    both = int((masks >> 31 & masks >> 5 & 1).sum())
    assert abs(both - n * 4e-4) <= 5 * (n * 4e-4) ** 0.5, "bits of one probability are independent"


def test_a_bit_beyond_the_dtype_is_refused() -> None:
    with pytest.raises(UserError, match=r"no bit 31(.|\n)*0 to 15"):
        flipped(torch.bfloat16, bits={31: 0.1})


def test_probabilities_are_not_rounded_to_powers_of_two() -> None:
    """0.2499 is 0.125 in the source."""
    masks = flipped(torch.bfloat16, p_frac=0.2499)
    n = ROWS * FEATURES * 7
    count = sum(int((masks >> bit & 1).sum()) for bit in range(7))
    assert abs(count / n - 0.2499) <= 5 * (0.2499 * 0.7501 / n) ** 0.5
