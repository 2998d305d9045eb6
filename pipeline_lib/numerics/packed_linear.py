"""The linear product with a packed weight: the definition, and the choice of how it is computed.

A weight [N, K] in groups of g along K lies as codes (LSB-first, `packing.pack`), scales [N, G] and zero points (packed
like codes), G = ceil(K / g). Element (n, k) is (code - zero) · scale, in fp32, then rounded to the dtype of the input.

On CUDA the Triton kernels of `packed_kernel` compute it, on a CPU with few rows the C loop of `packed_cpu`; both sum
fp32 products in another order than the definition and do not round the weight before they multiply where they need
not.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline_lib.numerics.grids import IntGrid, from_groups, group_count, to_groups
from pipeline_lib.numerics.packing import unpack

MOST_ROWS_ON_CPU = 64
"""Above it the decoded weight is multiplied, which is then faster."""
_WORD = 32  # bits that a kernel reads at a time


def packed_linear(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, bits: int, group_size: int
) -> Tensor:
    """x [..., K] -> [..., N]; not differentiable.

    Args:
        x: float32, bfloat16 or float16.
        codes: uint8 [N, ceil(K · bits / 8)].
        scale: [N, G], floating.
        zero: uint8 [N, ceil(G · bits / 8)].
        bias: [N] or None.
        bits: 2, 4 or 8.
        group_size: at least 1.
    """
    if torch.compiler.is_compiling() or x.device.type == "meta":
        return _op(x, codes, scale, zero, bias, bits, group_size)
    return _computed(x, codes, scale, zero, bias, bits, group_size)


def reference(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, bits: int, group_size: int
) -> Tensor:
    """The definition; arguments as of `packed_linear`."""
    return F.linear(x, decoded(codes, scale, zero, bits, group_size, x.shape[-1]).to(x.dtype), bias)


def decoded(codes: Tensor, scale: Tensor, zero: Tensor, bits: int, group_size: int, features: int) -> Tensor:
    """The fp32 weight [N, features]."""
    groups = group_count(features, group_size)
    parameters = {"scale": scale.float(), "zero": unpack(zero, bits, groups).float()}
    grouped = to_groups(unpack(codes, bits, features), group_size)
    return from_groups(IntGrid(bits).values(grouped, parameters), features)


def whole_words(features: int, bits: int, group_size: int) -> bool:
    """Whether rows and groups consist of whole 32-bit words of codes, as kernels need."""
    return features * bits % _WORD == 0 and (group_size * bits % _WORD == 0 or group_size >= features)


def _computed(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, bits: int, group_size: int
) -> Tensor:
    features = x.shape[-1]
    rows = x.numel() // max(features, 1)
    if rows == 0 or not whole_words(features, bits, group_size):
        return reference(x, codes, scale, zero, bias, bits, group_size)
    if x.device.type == "cuda":
        from pipeline_lib.numerics.packed_kernel import packed_linear_cuda

        return packed_linear_cuda(x, codes, scale, zero, bias, bits, group_size)
    if x.device.type == "cpu" and bits == 2 and rows <= MOST_ROWS_ON_CPU:
        from pipeline_lib.numerics import packed_cpu

        if packed_cpu.available():
            return packed_cpu.packed_linear(x, codes, scale, zero, bias, group_size)
    return reference(x, codes, scale, zero, bias, bits, group_size)


@torch.library.custom_op("errata::packed_linear", mutates_args=())
def _op(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, bits: int, group_size: int
) -> Tensor:
    return _computed(x, codes, scale, zero, bias, bits, group_size)


@_op.register_fake
def _(x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, bits: int, group_size: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))
