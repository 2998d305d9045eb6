"""Rounding to levels, the look-up table's least value, and the dither."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pipeline_lib.numerics.philox import philox4x32_int
from pipeline_lib.transforms.base import Draw
from pipeline_lib.transforms.optical.grid import TAG, Grid, _dither_of_tensors, dither, grids, quantise, quantise_result

UNKNOWN = [math.inf, -math.inf]


def grid(low: float, high: float, levels: int, lut_min: float | None = None, slack: float = 0.0) -> Grid:
    ranges = torch.tensor([UNKNOWN, [low, high], UNKNOWN])
    return grids(ranges, torch.tensor([levels - 1.0, 1.0, slack]), lut_min)[1]


def draw(key: int = 5, row: int = 0, vector: int = 0, strides: tuple[int, ...] = ()) -> Draw:
    return Draw(*(torch.tensor(value) for value in (key, row, vector)), strides=strides)


def test_values_are_the_nearest_levels() -> None:
    x = torch.tensor([-9.0, -1.0, -0.9, -0.25, 0.0, 0.1, 0.26, 2.0, 7.0])
    # Levels -1, -0.5, … 2: half a step between two goes to the even one; what is outside, to the end.
    expected = [-1.0, -1.0, -1.0, 0.0, 0.0, 0.0, 0.5, 2.0, 2.0]
    assert quantise(x, grid(-1.0, 2.0, 7)).tolist() == expected
    assert quantise(x, grid(-1.0, 2.0, 2)).tolist() == [-1.0] * 6 + [-1.0, 2.0, 2.0]


@pytest.mark.parametrize("levels", [2, 3, 16, 256, 2**16, 2**20])
def test_at_most_so_many_levels_and_never_more_than_half_a_step_away(levels: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(7, 4001, dtype=torch.float64).float()
    y = quantise(x, grid(-2.0, 3.0, levels))
    assert y.unique().numel() <= levels
    assert (y - x.clamp(-2, 3)).abs().max() <= 2.5 / (levels - 1) + 2e-6
    assert y.min() >= -2 and y.max() <= 3 + 1e-6


def test_a_range_that_is_unknown_changes_nothing_and_one_without_width_gives_its_value() -> None:
    x = torch.randn(3, 5)
    assert torch.equal(quantise(x, grid(*UNKNOWN, 16)), x)  # pyright: ignore[reportCallIssue]
    assert quantise(x, grid(0.5, 0.5, 16)).eq(0.5).all()
    assert quantise(x, grid(0.0, 1e-37, 256)).eq(0.0).all(), "255 / 1e-37 is beyond fp32"


def test_the_look_up_table_has_a_least_magnitude_on_each_side_and_a_zero() -> None:
    x = torch.linspace(-1, 2, 301)
    plain, table = quantise(x, grid(-1.0, 2.0, 301)), quantise(x, grid(-1.0, 2.0, 301, lut_min=0.1025))
    small = (plain > 0) & (plain < 0.205)
    assert torch.equal(table[small], torch.full_like(table[small], 0.205))
    small_below = (plain < 0) & (plain > -0.1025)
    assert torch.equal(table[small_below], torch.full_like(table[small_below], -0.1025))
    others = ~small & ~small_below
    assert torch.equal(table[others], plain[others])
    zero = quantise(torch.zeros(1), grid(0.0, 1.0, 256, lut_min=0.1025))
    assert zero.item() == 0.0


def test_slack_takes_part_of_the_rounding_back() -> None:
    x = torch.rand(1000)
    full = quantise(x, grid(0.0, 1.0, 4))
    torch.testing.assert_close(quantise(x, grid(0.0, 1.0, 4, slack=1.0)), x)
    torch.testing.assert_close(quantise(x, grid(0.0, 1.0, 4, slack=0.25)), full + (x - full) * 0.25)


def test_a_strided_operand_is_rounded_like_its_copy() -> None:
    x = torch.randn(2, 3, 5, 8)
    assert torch.equal(quantise(x.mT, grid(-1.0, 1.0, 9)), quantise(x.mT.contiguous(), grid(-1.0, 1.0, 9)))


def test_the_dither_is_what_the_page_says() -> None:
    """By plain integers, element by element; on [2 rows, 3 positions, 4 heads, 21 features]."""
    shape = torch.Size([2, 4, 3, 21])
    noise = dither(draw(-77, 9, 40, strides=(1, 4)), shape)
    key = -77 % 2**64
    for row, head, position, feature in [(0, 0, 0, 0), (1, 3, 2, 20), (0, 1, 2, 7), (1, 0, 1, 8), (1, 2, 0, 17)]:
        vector = 40 + head + 4 * position
        words = philox4x32_int(feature // 8, vector, 9 + row, TAG, key & 0xFFFFFFFF, key >> 32)
        half = words[feature % 8 // 2] >> 16 * (feature % 2) & 0xFFFF
        assert noise[row, head, position, feature].item() == (half + 0.5) / 2**16 - 0.5


def test_both_forms_of_the_dither_agree() -> None:
    shape, one = torch.Size([3, 5, 2, 29]), draw(2**62 + 3, 2**32 - 2, 11, strides=(7, 1))
    fast = dither(one, shape)
    assert torch.equal(fast, _dither_of_tensors(one, shape))


def test_every_element_has_noise_of_its_own() -> None:
    """The statistics of independent uniform numbers: over elements, neighbours, rows, steps, and as a whole."""
    shape = torch.Size([8, 64, 128])
    n = shape.numel()
    noise = dither(draw(1, strides=(1,)), shape).double()
    assert noise.abs().max() < 0.5
    assert abs(noise.mean()) < 4 * (1 / 12 / n) ** 0.5
    assert abs(noise.var() - 1 / 12) < 4 * (1 / 180 / n) ** 0.5
    counts = torch.histc(noise.float(), 64, -0.5, 0.5)
    assert ((counts - n / 64) ** 2 / (n / 64)).sum() < 63 + 5 * 126**0.5
    for other in (
        noise.roll(1, -1), noise.roll(8, -1), noise.roll(1, 1), noise.roll(1, 0),
        dither(draw(2, strides=(1,)), shape).double(),
    ):  # fmt: skip
        assert abs((noise * other).mean()) < 4 * (1 / 144 / n) ** 0.5


def test_dither_makes_the_mean_exact_where_rounding_alone_would_not() -> None:
    x = torch.full((1, 400, 500), 0.3)
    of_result = grid(0.0, 3.0, 4)
    assert quantise(x, of_result).eq(0).all()
    y = quantise_result(x.clone(), of_result, draw(strides=(1,)))
    assert set(y.unique().tolist()) == {0.0, 1.0}
    assert abs(y.mean() - 0.3) < 4 * (0.3 * 0.7 / y.numel()) ** 0.5


@pytest.mark.parametrize("levels", [2, 256, 2**20, 2**22])
def test_dither_never_leaves_the_range(levels: int) -> None:
    x = torch.tensor([-1.0, 1.0]).repeat(2, 512)[:, None]
    y = quantise_result(x.clone(), grid(-1.0, 1.0, levels), draw(strides=(1,)))
    assert y.min() >= -1 and y.max() <= 1 + 1e-6


def test_the_definition_is_the_same_on_tensors_and_floats() -> None:
    """A GPU computes with 0-d tensors what a CPU computes with numbers."""
    x = torch.randn(2, 3, 50)
    for ranges in ([-1.0, 2.0], [0.7, 0.7], UNKNOWN):
        numbers = grid(ranges[0], ranges[1], 16, 0.1, 0.3)
        tensors = Grid(*(torch.tensor(value) for value in numbers))
        assert torch.equal(quantise(x, numbers), quantise(x, tensors))
        one = draw(3, strides=(1,))
        assert torch.equal(quantise_result(x.clone(), numbers, one), quantise_result(x.clone(), tensors, one))


def test_the_formula_by_numpy() -> None:
    """In single precision, operation by operation, as the page has it."""
    x = np.random.default_rng(0).normal(size=500).astype(np.float32)
    m, top, steps = np.float32(-0.7), np.float32(1.9), np.float32(99)
    u = np.rint((np.clip(x, m, top) - m) * (steps / (top - m)))
    expected = u * ((top - m) / steps) + m
    assert quantise(torch.from_numpy(x), grid(-0.7, 1.9, 100)).numpy().tolist() == expected.tolist()
