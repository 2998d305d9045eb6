"""The product of an optical machine: round both operands, multiply, round the result with noise.

    A = q(left)    B = q(right), with the look-up table    C = A·B    Y = q(C, noise)

A and B are rounded to the dtype of the operands, C is summed in fp32 and rounded to levels before it gets that dtype.
Backward is straight through with the operands as they were (Anderson et al., 2023, arXiv 2302.10360, section 4): with
gradient G of Y, G·rightᵀ for left and leftᵀ·G for right; gated, G is 0 where C was outside its range, and a gradient is
0 where its operand was.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline_lib.transforms.base import Draw
from pipeline_lib.transforms.optical.grid import grids, quantise, quantise_result


class How(NamedTuple):
    """What does not change from pass to pass.

    Attributes:
        linear: right is a weight [m, k], used transposed; else a batch of [k, m].
        lut_min, gate, quantiles: see the settings.
        observe: tell what was seen.
        exact: only observe, compute exactly.
        eased: the slack may be other than 0.
    """

    linear: bool
    lut_min: float | None
    gate: bool
    quantiles: tuple[float, float] | None
    observe: bool
    exact: bool
    eased: bool = False


def product(
    left: Tensor, right: Tensor, ranges: Tensor, knobs: Tensor, draw: Draw | None, how: How
) -> tuple[Tensor, Tensor]:
    """The product, differentiable with respect to left and right; and what was seen.

    Args:
        left: [rows, …, n, k], or [rows, k] of a linear layer.
        right: [rows, …, k, m], or a weight [m, k]; of the dtype of left.
        ranges: [3, 2] fp32, of left, right and result.
        knobs: [3] fp32, see `grids`.
        draw: of the result's noise; None for none.

    Returns:
        [rows, …, n, m] in the dtype of left; [3, 2] fp32, (−least, largest) value of left, right and the result before
        it is rounded, −inf where nothing was observed.
    """
    place = (None, None, None) if draw is None else (draw.key, draw.first_row, draw.first_element)
    strides = [] if draw is None or draw.strides is None else list(draw.strides)
    inputs = (left, right, ranges, knobs, *place, strides, how.linear, how.lut_min, how.gate, how.quantiles)
    inputs = (*inputs, how.observe, how.exact, how.eased)
    if torch.compiler.is_compiling():
        return _product_op(*inputs)[:2]
    return _Product.apply(*inputs)[:2]  # type: ignore[index]  # eager: without an operator's overhead


def _forward(
    left: Tensor,
    right: Tensor,
    ranges: Tensor,
    knobs: Tensor,
    key: Tensor | None,
    row: Tensor | None,
    vector: Tensor | None,
    strides: Sequence[int],
    linear: bool,
    lut_min: float | None,
    gate: bool,
    quantiles: Sequence[float] | None,
    observe: bool,
    exact: bool,
    eased: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    draw = None
    if key is not None and row is not None and vector is not None:
        draw = Draw(key, row, vector, strides=tuple(strides))
    how = How(linear, lut_min, gate, None if quantiles is None else (quantiles[0], quantiles[1]), observe, exact)
    if not left.is_cuda or exact or (observe and quantiles is not None):
        return reference(left, right, ranges, knobs, draw, how)
    from pipeline_lib.transforms.optical.kernel import launch

    reach = torch.full((3, 2), -torch.inf, device=left.device)
    if observe:
        reach[0], reach[1] = observed(left, None), observed(right, None)
    y, reach[2], outside = launch(
        left, right, ranges, knobs, draw, linear=linear, lut_min=lut_min, gate=gate, observe=observe, eased=eased
    )
    return y, reach, outside


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    left, right, ranges = inputs[:3]
    ctx.linear, gate = inputs[8], inputs[10]
    # The ranges move before a backward pass that comes late.
    ctx.save_for_backward(left, right, *((ranges.clone(), output[2]) if gate else ()))
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, *gradients: Any) -> Any:
    left, right, *gates = ctx.saved_tensors
    gradient: Tensor = gradients[0]
    if gates:
        gradient = gradient.masked_fill(gates[1], 0)
    of_left = of_right = None
    if ctx.needs_input_grad[0]:
        of_left = gradient @ (right if ctx.linear else right.mT)
    if ctx.needs_input_grad[1]:
        of_right = (gradient.flatten(0, -2).t() @ left.flatten(0, -2)) if ctx.linear else left.mT @ gradient
    if gates:
        of_left = None if of_left is None else of_left.masked_fill(_outside(left, gates[0][0]), 0)
        of_right = None if of_right is None else of_right.masked_fill(_outside(right, gates[0][1]), 0)
    return of_left, of_right, *([None] * 13)


class _Product(torch.autograd.Function):
    forward, setup_context, backward = (staticmethod(f) for f in (_forward, _setup, _backward))  # type: ignore[assignment]


_product_op = torch.library.custom_op("errata::optical_product", _forward, mutates_args=())


@_product_op.register_fake
def _(left: Tensor, right: Tensor, ranges: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    linear, gate = _[5], _[7]
    y = left.new_empty(*left.shape[:-1], right.shape[0] if linear else right.shape[-1])
    return y, torch.empty_like(ranges), left.new_empty(y.shape if gate else 0, dtype=torch.bool)


_product_op.register_autograd(_backward, setup_context=_setup)


def reference(
    left: Tensor, right: Tensor, ranges: Tensor, knobs: Tensor, draw: Draw | None, how: How
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition: (result, what was seen, where the result was outside its range; the last only if gated)."""
    reach = torch.full((3, 2), -torch.inf, device=left.device)
    if how.observe:
        reach[0] = observed(left, how.quantiles)
        reach[1] = observed(right[None] if how.linear else right, how.quantiles)
    if how.exact:
        a, b = left.float(), right.float()
    else:
        of_left, of_right, of_result = grids(ranges, knobs, how.lut_min)
        a, b = quantise(left, of_left).to(left.dtype).float(), quantise(right, of_right).to(left.dtype).float()
    c = a @ (b.t() if how.linear else b)
    if how.observe:
        reach[2] = observed(c, how.quantiles)
    outside = _outside(c, ranges[2]) if how.gate else c.new_empty(0, dtype=torch.bool)
    if not how.exact:
        c = quantise_result(c, of_result, draw)
    return c.to(left.dtype), reach, outside


def observed(value: Tensor, quantiles: tuple[float, float] | None) -> Tensor:
    """(−least, largest) value, [2] fp32; with quantiles (a, b) those of a row, the outermost of all rows.

    The q-quantile of n elements is the ⌈q·n⌉-th smallest. Taken row by row it is the same however a batch is cut.
    """
    if quantiles is None:
        low, high = value.aminmax()
    else:
        rows = value.flatten(1)
        first, last = (min(max(-int(-q * rows.shape[1] // 1), 1), rows.shape[1]) for q in quantiles)
        low, high = rows.kthvalue(first, 1).values.amin(), rows.kthvalue(last, 1).values.amax()
    return torch.stack([-low, high]).float()


def _outside(value: Tensor, range: Tensor) -> Tensor:
    """Where a value is outside a range that is known."""
    return ((value < range[0]) | (value > range[1])) & (range[0] <= range[1])
