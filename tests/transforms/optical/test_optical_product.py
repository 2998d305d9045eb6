"""One optical product: ranges, gradients, precision, ramp, settings."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline_lib.config.errors import UserError
from pipeline_lib.config.validate import validate
from pipeline_lib.transforms.base import Draw, Site
from pipeline_lib.transforms.optical import build
from pipeline_lib.transforms.optical.compute import OpticalProduct
from pipeline_lib.transforms.optical.product import How, observed, product
from pipeline_lib.transforms.optical.settings import Settings


def made(kind: str = "linear", name: str = "x", **settings: Any) -> OpticalProduct:
    [transform] = [build(Settings(**settings))]
    compute = transform.compute(Site(kind, name, (1, 1) if kind == "linear" else ()))  # type: ignore[arg-type]
    assert isinstance(compute, OpticalProduct)
    compute.transform = transform  # type: ignore[assignment]
    return compute


def draw(shape: tuple[int, ...], step: int = 0) -> Draw:
    numbers = (torch.tensor(value) for value in (7, 0, 0))
    return Draw(*numbers, step=torch.tensor(step), strides=(1,) * (len(shape) - 2))


def steps(compute: OpticalProduct, inputs: list[Tensor], weight: Tensor) -> list[Tensor]:
    """The ranges after each of some training steps."""
    found = []
    for x in inputs:
        compute(x, weight, draw=draw(tuple(x.shape)))
        compute.transform.settle()  # type: ignore[union-attr, operator]
        found.append(compute.ranges.clone())
    return found


def test_ranges_follow_activations_that_grow_and_shrink() -> None:
    torch.manual_seed(0)
    compute, weight = made(smoothing=0.5), torch.randn(6, 5)
    x = torch.randn(4, 8, 5)
    exact = (x @ weight.t()).max()
    ranges = steps(compute, [x] + [10 * x] * 12 + [0.1 * x] * 20, weight)
    assert ranges[0][2, 1] == pytest.approx(exact.item(), rel=1e-5)
    assert ranges[1][2, 1] > ranges[0][2, 1], "the result is observed before it is clamped"
    assert ranges[12][2, 1] == pytest.approx(10 * exact.item(), rel=0.05)
    assert ranges[-1][2, 1] == pytest.approx(0.1 * exact.item(), rel=0.15)
    assert ranges[12][0].tolist() == pytest.approx([10 * x.min().item(), 10 * x.max().item()], rel=0.01)


def test_the_first_step_is_exact_and_a_step_moves_a_range_by_the_smoothing() -> None:
    compute, weight = made(levels=4, smoothing=0.75, dither=False), torch.eye(3)
    x = torch.tensor([[[0.1, 0.5, 1.0]]])
    assert torch.equal(compute(x, weight), x)
    compute.transform.settle()  # type: ignore[union-attr, operator]
    compute(5 * x, weight)
    compute.transform.settle()  # type: ignore[union-attr, operator]
    assert compute.ranges[0].tolist() == pytest.approx([0.75 * 0.1 + 0.25 * 0.5, 0.75 + 0.25 * 5])


def test_passes_of_a_step_share_a_range_and_bad_values_move_none() -> None:
    compute, weight = made(), torch.eye(2)
    for value in (torch.tensor([[[0.0, 1.0]]]), torch.tensor([[[-3.0, 0.5]]])):
        compute(value, weight, draw=draw((1, 1, 2)))
    compute.transform.settle()  # type: ignore[union-attr, operator]
    assert compute.ranges[0].tolist() == [-3.0, 1.0]
    for value in (math.inf, math.nan):
        compute(torch.tensor([[[value, 0.0]]]), weight, draw=draw((1, 1, 2)))
        compute.transform.settle()  # type: ignore[union-attr, operator]
        assert compute.ranges[0].tolist() == [-3.0, 1.0]
        assert compute.ranges.isfinite().all()


def test_a_bias_is_exact_and_no_part_of_the_range() -> None:
    compute, weight, x = made(levels=4, dither=False, lut_min=None), torch.eye(2), torch.tensor([[[-1.0, 1.0]]])
    bias = torch.tensor([100.0, 0.123])
    for _ in range(2):
        assert torch.equal(compute(x, weight, bias), x + bias)
        compute.transform.settle()  # type: ignore[union-attr, operator]
    assert compute.ranges[2].tolist() == [-1.0, 1.0]


def test_evaluation_moves_no_range() -> None:
    compute, weight = made(), torch.eye(2)
    steps(compute, [torch.randn(2, 3, 2)], weight)
    before = compute.ranges.clone()
    compute.eval()
    compute(100 * torch.randn(2, 3, 2), weight, draw=draw((2, 3, 2)))
    compute.transform.settle()  # type: ignore[union-attr, operator]
    assert torch.equal(compute.ranges, before)


def test_quantiles_are_those_of_a_row_and_the_outermost_counts() -> None:
    compute = made(quantiles=(0.1, 0.9), dither=False)
    x = torch.stack([torch.arange(100.0), torch.arange(100.0) + 50]).view(2, 10, 10)
    steps(compute, [x], torch.eye(10))
    assert compute.ranges[0].tolist() == [9.0, 139.0]
    assert compute.ranges[1].tolist() == [0.0, 0.0]  # ten ones among a hundred: the 90th smallest is 0
    large = torch.arange(2**24 + 8).view(1, 2, -1)  # more than torch.quantile takes
    assert observed(large, (0.0, 0.5)).tolist() == [0.0, 2**23 + 3]


def test_probabilities_have_the_range_from_0_to_1_and_zeros_stay() -> None:
    compute = made("product", "a.attention_value", levels=3, dither=False, lut_min=None)
    left = torch.softmax(torch.randn(2, 3, 4, 4), -1).tril()
    right = torch.randn(2, 3, 4, 5)
    for _ in range(3):
        compute(left, right)
        compute.transform.settle()  # type: ignore[union-attr, operator]
        assert compute.ranges[0].tolist() == [0.0, 1.0]
    compute.eval()
    hidden = right.clone()
    hidden[:, :, -1] = 1e6
    assert torch.equal(compute(left, right)[:, :, :-1], compute(left, hidden)[:, :, :-1])


def loose(left: Tensor, right: Tensor, gate: bool, linear: bool) -> tuple[Tensor, ...]:
    ranges = torch.tensor([[-1.0, 1.0], [-1.0, 1.0], [-1.5, 1.5]])
    how = How(linear, None, gate, None, False, False)
    y, _ = product(left, right, ranges, torch.tensor([15.0, 15.0, 0.0]), None, how)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    return (y.detach(), upstream, *torch.autograd.grad(y, (left, right), upstream))


@pytest.mark.parametrize("linear", [True, False])
def test_gradients_pass_straight_through(linear: bool) -> None:
    torch.manual_seed(0)
    left = torch.randn(2, 3, 4, requires_grad=True)
    right = torch.randn(5, 4, requires_grad=True) if linear else torch.randn(2, 4, 5, requires_grad=True)
    _, g, of_left, of_right = loose(left, right, False, linear)
    torch.testing.assert_close(of_left, g @ (right if linear else right.mT))
    torch.testing.assert_close(of_right, torch.einsum("bnm,bnk->mk", g, left) if linear else left.mT @ g)
    y, _, of_left, of_right = loose(left, right, True, linear)
    a, b = left.clamp(-1, 1), right.clamp(-1, 1)
    assert y.abs().max() <= 1.5 + 1e-6
    outside = (left.abs() > 1) | (of_left == 0)
    assert torch.equal(outside, of_left == 0) and (left.abs() > 1).any()
    assert (of_right[right.abs() > 1] == 0).all() and (of_right != 0).any()
    del a, b


def test_the_gate_closes_where_the_result_was_outside() -> None:
    left, right = torch.tensor([[[0.9], [0.1]]], requires_grad=True), torch.tensor([[0.5]], requires_grad=True)
    ranges, knobs = torch.tensor([[-1.0, 1.0], [-1.0, 1.0], [-0.2, 0.2]]), torch.tensor([255.0, 255.0, 0.0])
    for gate, expected in ((True, [0.0, 0.5]), (False, [0.5, 0.5])):
        y, _ = product(left, right, ranges, knobs, None, How(True, None, gate, None, False, False))
        [gradient] = torch.autograd.grad(y.sum(), left)
        assert gradient.flatten().tolist() == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sums_and_rounds_in_single(dtype: torch.dtype) -> None:
    """A narrow range far from zero survives, and levels are those of fp32, rounded once at the end."""
    torch.manual_seed(0)
    left, right = torch.randn(2, 3, 64).to(dtype), torch.randn(8, 64).to(dtype)
    ranges, knobs = torch.tensor([[-3.0, 3.0], [-3.0, 3.0], [9.0, 9.5]]), torch.tensor([63.0, 63.0, 0.0])
    y, _ = product(left, right, ranges, knobs, None, How(True, 0.02, False, None, False, False))
    assert y.dtype == dtype and y.isfinite().all()
    narrow = torch.tensor([[-3.0, 3.0]] * 2 + [[2.0, 2.0]])
    y, _ = product(left, right, narrow, knobs, None, How(True, 0.02, False, None, False, False))
    assert y.eq(2).all(), "a range without width divides nothing by zero"


def test_a_ramp_begins_gently_and_evaluation_has_full_strength() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(4, 16, 8), torch.randn(8, 8)
    exact = x @ weight.t()
    for ramp in ({"of": "noise"}, {"of": "levels"}):
        compute = made(levels=8, dither=False, lut_min=None, ramp={**ramp, "steps": 10})
        steps(compute, [x], weight)
        errors = []
        for step in (0, 5, 10, 1000):
            errors.append((compute(x, weight, draw=draw((4, 16, 8), step)) - exact).abs().mean().item())
        compute.eval()
        errors.append((compute(x, weight, draw=draw((4, 16, 8))) - exact).abs().mean().item())
        assert errors[0] < 1e-3 < errors[1] < errors[2]
        assert errors[2] == errors[3] == errors[4]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"levels": 1}, "greater than or equal to 2"),
        ({"levels": 2**23}, "4194304"),
        ({"quantiles": [0.9, 0.1]}, "rising"),
        ({"lut_min": 1.5}, "less than 1"),
        ({"ramp": {"of": "levels"}}, "steps"),
        ({"levels": 2**17, "ramp": {"steps": 9}}, "from_levels"),
        ({"sites": {"*": {"levels": 0}}}, "greater than or equal to 2"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((UserError, ValueError), match=message):
        validate(Settings, settings, "transforms.optical")
