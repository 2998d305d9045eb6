"""Quantisation grids against their formulas, written out element by element."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from pipeline_lib.numerics.grids import GRIDS, Grid, IntGrid, NormalFloat3, from_groups, group_count, to_groups

POSITIVE = [0.0, 0.1833375245332718, 0.3819939494132996, 0.6229856610298157, 1.0]
NEGATIVE = [0.0, -0.2469314038753510, -0.5350227355957031, -1.0]


def quantised(w: Tensor, grid: Grid, dtype: torch.dtype = torch.float32) -> Tensor:
    """[..., group] through codes and back."""
    parameters = grid.parameters(w.amin(-1), w.amax(-1), dtype)
    return grid.values(grid.codes(w, parameters), parameters)


def half_even(x: float) -> int:
    return round(x)  # Python's own rounding


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shift", [0.0, 0.7, 5.0, -5.0])
def test_integers_by_hand(bits: int, shift: float) -> None:
    groups = torch.randn(7, 16, generator=torch.Generator().manual_seed(bits), dtype=torch.float64) + shift
    top = 2**bits - 1
    for group, got in zip(groups.float(), quantised(groups.float(), IntGrid(bits)), strict=True):
        low, high = group.min().item(), group.max().item()
        s = max(high - low, 1e-5) / top
        z = min(max(-half_even(low / s), 0), top)
        for w, value in zip(group.tolist(), got.tolist(), strict=True):
            q = min(max(half_even(w / s) + z, 0), top)
            assert value == pytest.approx((q - z) * s, rel=1e-5, abs=1e-7)


def test_halves_round_to_even() -> None:
    """min 0, max 3: the scale is 1, and 0.5, 1.5, 2.5 are ties."""
    w = torch.tensor([[0.0, 0.5, 1.5, 2.5, 3.0]])
    assert quantised(w, IntGrid(2)).tolist() == [[0, 0, 2, 2, 3]]


def test_zero_is_a_value_of_the_grid() -> None:
    """Also where the range lies on one side of zero: the zero point saturates, and the range is not covered."""
    w = torch.randn(50, 128, generator=torch.Generator().manual_seed(0)) * 0.1
    w[:, 3] = 0
    for sided in (w, w + 10, w - 10):
        sided[:, 3] = 0
        assert not quantised(sided, IntGrid(2))[:, 3].any()
    parameters = IntGrid(2).parameters(torch.tensor([4.0, -5.0]), torch.tensor([5.0, -4.0]), torch.float32)
    assert parameters["zero"].tolist() == [0, 3]


def test_a_constant_group_has_a_scale() -> None:
    w = torch.full((1, 8), 0.25)
    parameters = IntGrid(2).parameters(w.amin(-1), w.amax(-1), torch.float32)
    assert parameters["scale"].item() == pytest.approx(1e-5 / 3)
    assert torch.isfinite(quantised(w, IntGrid(2))).all()


def test_normal_float_takes_the_nearest_level() -> None:
    groups = torch.randn(20, 32, generator=torch.Generator().manual_seed(1)) * 3
    for group, got in zip(groups, quantised(groups, NormalFloat3()), strict=True):
        for w, value in zip(group.tolist(), got.tolist(), strict=True):
            scale, levels = (group.max().item(), POSITIVE) if w >= 0 else (-group.min().item(), NEGATIVE)
            nearest = min(levels, key=lambda level: abs(level - w / scale))
            assert value == pytest.approx(nearest * scale, rel=1e-6, abs=1e-9)


def test_normal_float_on_a_midpoint_takes_the_larger_level() -> None:
    bounds = [(a + b) / 2 for levels in (POSITIVE, NEGATIVE) for a, b in pairwise(levels)]
    bounds = torch.tensor(bounds, dtype=torch.float64).float().tolist()
    w = torch.tensor([[-1.0, 1.0, *bounds]])
    got = quantised(w, NormalFloat3())[0, 2:].tolist()
    expected = [*POSITIVE[1:], *NEGATIVE[:3]]
    assert got == pytest.approx(expected)


def test_normal_float_without_a_side_is_no_nan() -> None:
    """A group whose largest or smallest value is exactly 0: 0/0 in a careless quotient."""
    for w in (-torch.rand(1, 8), torch.rand(1, 8), torch.zeros(1, 8)):
        w[0, 0] = 0
        got = quantised(w, NormalFloat3())
        assert torch.isfinite(got).all()
        assert got[0, 0] == 0
        assert (got.sign() * w.sign() >= 0).all()


def gradient(w: Tensor, grid: Grid, g: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """dL/dw through the straight-through estimator, where L = sum g · w'."""
    w = w.clone().requires_grad_()
    parameters = grid.parameters(w.amin(-1), w.amax(-1), dtype)
    value = grid.values(grid.codes(w.detach(), {k: v.detach() for k, v in parameters.items()}), parameters)
    through = grid.through(w, parameters)
    assert not through.any(), "the estimator changes no value"
    ((value + through) * g).sum().backward()
    assert w.grad is not None
    return w.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shift", [0.0, 0.6, 6.0])
def test_gradient_of_integers(dtype: torch.dtype, shift: float) -> None:
    """Identity inside the range; through the scale, A/3 to the largest element and -A/3 to the smallest."""
    generator = torch.Generator().manual_seed(3)
    w, g = torch.randn(1, 64, generator=generator) + shift, torch.randn(1, 64, generator=generator)
    parameters = IntGrid(2).parameters(w.amin(-1), w.amax(-1), dtype)
    s, z = parameters["scale"].item(), parameters["zero"].item()
    shifted = (w / s).round() + z
    inside = ((shifted >= 0) & (shifted <= 3)).float()
    q = shifted.clamp(0, 3)
    expected = g * inside
    a = (g * ((q - z) - inside * w / s)).sum() / 3
    expected[0, w.argmax()] += a
    expected[0, w.argmin()] -= a
    assert torch.allclose(gradient(w, IntGrid(2), g, dtype), expected, rtol=1e-4, atol=1e-5)
    if shift == 6.0:
        assert not inside.all(), "some elements are clamped, and get no gradient of their own"


def test_the_gradient_of_ties_is_shared() -> None:
    w = torch.tensor([[1.0, 1.0, -1.0, 0.2]])
    got = gradient(w, IntGrid(2), torch.tensor([[0.0, 0.0, 0.0, 1.0]]))
    assert got[0, 0] == got[0, 1] != 0


def test_a_degenerate_range_gives_the_scale_no_gradient() -> None:
    w = torch.full((1, 4), 0.5) + torch.tensor([0, 1e-7, 0, 0])
    g = torch.ones(1, 4)
    got = gradient(w, IntGrid(2), g)
    assert set(got.flatten().tolist()) <= {0.0, 1.0}


def test_gradient_of_normal_float() -> None:
    """Identity; and through the two scales to the largest and the smallest element."""
    generator = torch.Generator().manual_seed(4)
    w, g = torch.randn(1, 32, generator=generator), torch.randn(1, 32, generator=generator)
    high, low = w.max(), w.min().abs()
    scale = torch.where(w >= 0, high, low)
    level = quantised(w, NormalFloat3()) / scale
    per_scale = g * (level - w / scale)
    expected = g.clone()
    expected[0, w.argmax()] += per_scale[w >= 0].sum()
    expected[0, w.argmin()] -= per_scale[w < 0].sum()
    assert torch.allclose(gradient(w, NormalFloat3(), g), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", list(GRIDS))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_are_those_that_can_be_stored(name: str, dtype: torch.dtype) -> None:
    """What training computes with is what packing stores: rounding a scale again changes nothing."""
    w = torch.randn(200, 32, generator=torch.Generator().manual_seed(5)) * 0.02
    grid = GRIDS[name]
    parameters = grid.parameters(w.amin(-1), w.amax(-1), dtype)
    for scale in grid.scales:
        assert torch.equal(parameters[scale], parameters[scale].to(dtype).float())


@pytest.mark.parametrize("name", list(GRIDS))
def test_codes_and_values_are_inverse(name: str) -> None:
    grid = GRIDS[name]
    w = torch.randn(50, 64, generator=torch.Generator().manual_seed(6))
    parameters = grid.parameters(w.amin(-1), w.amax(-1), torch.float32)
    codes = grid.codes(w, parameters)
    assert int(codes.max()) < 2**grid.bits
    assert torch.equal(grid.codes(grid.values(codes, parameters), parameters), codes)
    everything = torch.arange(2**grid.bits).repeat(50, 1)
    assert len(set(grid.values(everything, parameters)[0].tolist())) == 2**grid.bits, "each code is a value of its own"


@pytest.mark.parametrize(
    ("features", "size", "groups"), [(128, 128, 1), (129, 128, 2), (100, -1, 1), (7, 3, 3), (5, 8, 1)]
)
def test_groups_of_any_size(features: int, size: int, groups: int) -> None:
    rows = torch.randn(4, features)
    grouped = to_groups(rows, size)
    assert group_count(features, size) == groups == grouped.shape[1]
    assert torch.equal(from_groups(grouped, features), rows)
    assert grouped[:, -1].max() <= rows.max(), "what fills the last group does not widen its range"
    assert set(grouped.flatten().tolist()) == set(rows.flatten().tolist())


def test_bits_per_weight() -> None:
    """2 bits, 16 of a scale and 2 of a zero point for 128 weights: 2.140625."""
    assert GRIDS["int2-asym"].bits_per_weight(128, torch.float16) == 2.140625
    assert GRIDS["n2f3"].bits_per_weight(128, torch.float16) == 3.25
    assert math.isclose(GRIDS["int4-asym"].bits_per_weight(64, torch.float32), 4 + 36 / 64)
