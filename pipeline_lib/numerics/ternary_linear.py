"""x · Wᵀ and its input gradient with W as packed ternary codes, never as one dequantised matrix.

On a CPU a tile of rows is unpacked, multiplied and forgotten; on CUDA `ternary_kernel` unpacks in registers. The packed
weight is a constant: there is no gradient to it. Sums run in the dtype of x on a CPU, in fp32 on CUDA.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipeline_lib.numerics.look_up import look_up
from pipeline_lib.numerics.trits import Layout, code_table, spread

TILE = 2**20
"""Weights unpacked at once on a CPU: 4 MiB in fp32, which stays in the cache of a core; or as many as x has elements,
where that is more, since a product arranges x anew for each tile, but no more than a quarter of the matrix."""


def dequantise(packed: Tensor, scale: Tensor, features: int, layout: Layout, group_size: int | None) -> Tensor:
    """The weight [out, features], codes · scale, in the dtype of the scale.

    Args:
        packed: uint8 [out, bytes].
        scale: [1, 1] or [out, groups].
    """
    table = code_table(layout, scale.dtype, packed.device)
    if scale.numel() == 1:
        table = table * scale
    codes = look_up(table, packed, features)
    return codes if scale.numel() == 1 else codes * spread(scale, features, group_size)


def ternary_linear(
    x: Tensor, packed: Tensor, scale: Tensor, features: int, layout: Layout = "trits", group_size: int | None = None
) -> Tensor:
    """x · Wᵀ, differentiable with respect to x.

    Args:
        x: [..., features], fp32, bf16 or fp16.
        packed, scale: as in `dequantise`.

    Returns:
        [..., out], in the dtype of x.
    """
    return _TernaryLinear.apply(x, packed, scale, features, layout, group_size)  # type: ignore[return-value]


class _TernaryLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, packed: Tensor, scale: Tensor, features: int, layout: Layout, group_size: int | None
    ) -> Tensor:
        ctx.save_for_backward(packed, scale)
        ctx.grid = (features, layout, group_size)
        product = _cuda().forward if x.is_cuda else _forward
        return product(x.reshape(-1, features), packed, scale, layout, group_size).view(*x.shape[:-1], len(packed))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        packed, scale = ctx.saved_tensors
        features, layout, group_size = ctx.grid
        product = _cuda().input_gradient if gradient.is_cuda else _input_gradient
        rows = gradient.reshape(-1, len(packed))
        return product(rows, packed, scale, features, layout, group_size).view(*gradient.shape[:-1], features), *(
            [None] * 5
        )


def _forward(x: Tensor, packed: Tensor, scale: Tensor, layout: Layout, group_size: int | None) -> Tensor:
    """[n, out] from x [n, features]."""
    y = x.new_empty(len(x), len(packed))
    for first, last, tile in _tiles(packed, scale, x, x.shape[1], layout, group_size):
        torch.mm(x, tile.t(), out=y[:, first:last])
        del tile  # before the next one is there
    return y


def _input_gradient(
    gradient: Tensor, packed: Tensor, scale: Tensor, features: int, layout: Layout, group_size: int | None
) -> Tensor:
    """[n, features] from the gradient [n, out] of the output."""
    total = gradient.new_zeros(len(gradient), features)
    for first, last, tile in _tiles(packed, scale, gradient, features, layout, group_size):
        total.addmm_(gradient[:, first:last], tile)
        del tile
    return total


def _tiles(packed: Tensor, scale: Tensor, meets: Tensor, features: int, layout: Layout, group_size: int | None) -> Any:
    """(first row, row after the last, these rows of the weight), the tiles of a weight that meets [n, …] one by one."""
    scale = scale.to(meets.dtype)
    rows = max(TILE // features, min(len(meets), len(packed) // 4), 1)
    for first in range(0, len(packed), rows):
        last = min(first + rows, len(packed))
        part = scale if len(scale) == 1 else scale[first:last]
        yield first, last, dequantise(packed[first:last], part, features, layout, group_size)


def _cuda() -> Any:
    from pipeline_lib.numerics import ternary_kernel

    return ternary_kernel
