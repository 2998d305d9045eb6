"""Triton kernel of the optical product: rounds operands as they are read, multiplies, rounds the result with its noise.

One program makes one tile of the result and writes it once: neither rounded operands nor noise nor the exact result
ever lie in memory. Operands are rounded before what lies beyond the end of the sum is set to 0, so the result does not
depend on the tile. Rounding is bit for bit that of `grid` (contraction of products and sums is switched off), the noise
is, too; only the order of sums differs. The extremes of the result are gathered by atomic maxima.

Imported only where it is used: by CUDA tensors, and by tests under Triton's interpreter (TRITON_INTERPRET=1).
"""

# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false
# (kernels are Python that Triton compiles; a type checker sees only their surface)

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline_lib.numerics.flip_triton import _philox

if TYPE_CHECKING:
    from pipeline_lib.transforms.base import Draw

BLOCKS = {"BM": 64, "BN": 64, "BK": 32}


@triton.jit
def _grid(ranges, knobs, WHICH: tl.constexpr):
    low, high = tl.load(ranges + 2 * WHICH), tl.load(ranges + 2 * WHICH + 1)
    steps = tl.load(knobs + WHICH // 2)
    span = high - low
    # Of an unknown or empty range nothing is used that these would give.
    width = tl.where((span > 0) & (high < float("inf")), span, 1.0)
    scale = tl.where(span >= 7.888609052210118e-31, tl.div_rn(steps, width), 0.0)  # grid.NARROW
    step = tl.where(span > 0, tl.div_rn(width, steps), 0.0)
    return low, high, scale, step, steps


@triton.jit
def _nearest(u):
    return (u + 12582912.0) - 12582912.0  # 1.5 · 2^23: half to even for |u| up to 2^22


@triton.jit
def _operand(x, low, high, scale, step, slack, lut_min, LUT: tl.constexpr, SLACK: tl.constexpr):
    u = _nearest((tl.clamp(x, low, high, propagate_nan=tl.PropagateNan.ALL) - low) * scale)
    y = u * step + low
    if LUT:
        above, below = lut_min * high, -(lut_min * tl.abs(low))
        y = tl.where((y > 0) & (y < above), above, y)
        y = tl.where((y < 0) & (y > below), below, y)
    if SLACK:
        y = y - (y - x) * slack
    return tl.where(low <= high, y, x)


@triton.jit
def _noise(key, row, vector, n0, TAG: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """[BM, BN] of the features from n0 on, a multiple of 8; row and vector [BM] uint32."""
    k = tl.load(key)
    k0, k1 = k.to(tl.uint32), (k >> 32).to(tl.uint32)
    call = (n0 // 8 + tl.arange(0, BN // 8)).to(tl.uint32)[None, :]
    zero = tl.zeros([BM, BN // 8], tl.uint32)
    w0, w1, w2, w3 = _philox(zero + call, zero + vector[:, None], zero + row[:, None], zero + TAG, k0, k1)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [BM, BN // 2])
    halves = tl.reshape(tl.join(words & 0xFFFF, words >> 16), [BM, BN])
    return (halves.to(tl.float32) + 0.5) * 1.52587890625e-05 - 0.5


@triton.jit(do_not_specialize=["lut_min", "first", "second", "heads"])
def _product_kernel(
    a, b, y, outside, seen, ranges, knobs, key, first_row, first_vector, lut_min, heads, first, second,
    M, N, K, s_az, s_am, s_ak, s_bz, s_bk, s_bn,
    LINEAR: tl.constexpr, DITHER: tl.constexpr, LUT: tl.constexpr, SLACK: tl.constexpr, OBSERVE: tl.constexpr,
    GATE: tl.constexpr, TAG: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    # y[z, m, n] = q(Σ_k q(a[z, m, k])·q(b[z, k, n]))
    tiles = tl.cdiv(N, BN)
    m = tl.program_id(0) // tiles * BM + tl.arange(0, BM)
    n0 = tl.program_id(0) % tiles * BN
    n = n0 + tl.arange(0, BN)
    z = tl.program_id(1)
    slack = tl.load(knobs + 2)
    a_low, a_high, a_scale, a_step, _ = _grid(ranges, knobs, 0)
    b_low, b_high, b_scale, b_step, _ = _grid(ranges, knobs, 1)
    a_rows = a + z.to(tl.int64) * s_az + m.to(tl.int64)[:, None] * s_am
    b_columns = b + z.to(tl.int64) * s_bz + n.to(tl.int64)[None, :] * s_bn
    c = tl.zeros([BM, BN], tl.float32)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        in_a, in_b = (m[:, None] < M) & (k[None, :] < K), (k[:, None] < K) & (n[None, :] < N)
        x = tl.load(a_rows + k.to(tl.int64)[None, :] * s_ak, mask=in_a, other=0.0)
        w = tl.load(b_columns + k.to(tl.int64)[:, None] * s_bk, mask=in_b, other=0.0)
        xq = _operand(x.to(tl.float32), a_low, a_high, a_scale, a_step, slack, lut_min, False, SLACK)
        wq = _operand(w.to(tl.float32), b_low, b_high, b_scale, b_step, slack, lut_min, LUT, SLACK)
        xq, wq = tl.where(in_a, xq, 0.0).to(x.dtype), tl.where(in_b, wq, 0.0).to(w.dtype)
        c = tl.dot(xq, wq, c, input_precision="ieee")
    inside = (m[:, None] < M) & (n[None, :] < N)
    if OBSERVE:
        extent = tl.where(c == c, c, float("inf"))  # NaN: a maximum would pass it over, and no range may move
        tl.atomic_max(seen, tl.max(tl.max(tl.where(inside, -c, -float("inf")), 1), 0))
        tl.atomic_max(seen + 1, tl.max(tl.max(tl.where(inside, extent, -float("inf")), 1), 0))
    low, high, scale, step, steps = _grid(ranges, knobs, 2)
    u = (tl.clamp(c, low, high, propagate_nan=tl.PropagateNan.ALL) - low) * scale
    if DITHER:
        if LINEAR:
            row, vector = m // heads, m % heads  # heads: positions of a sequence
        else:
            row, vector = z // heads + 0 * m, z % heads * first + m * second
        row = (tl.load(first_row) + row).to(tl.uint32)
        vector = (tl.load(first_vector) + vector).to(tl.uint32)
        u += _noise(key, row, vector, n0, TAG, BM, BN)
    u = _nearest(u)
    if DITHER:
        u = tl.clamp(u, 0.0, steps, propagate_nan=tl.PropagateNan.ALL)
    value = u * step + low
    if SLACK:
        value = value - (value - c) * slack
    value = tl.where(low <= high, value, c)
    at = (z.to(tl.int64) * M + m.to(tl.int64)[:, None]) * N + n[None, :]
    tl.store(y + at, value.to(y.dtype.element_ty), mask=inside)
    if GATE:
        beyond = tl.where((c < low) | (c > high), 1, 0)
        tl.store(outside + at, tl.where(low <= high, beyond, 0).to(tl.int8), mask=inside)


def launch(
    left: Tensor,
    right: Tensor,
    ranges: Tensor,
    knobs: Tensor,
    draw: Draw | None,
    *,
    linear: bool,
    lut_min: float | None,
    gate: bool,
    observe: bool,
    eased: bool,
    blocks: dict[str, int] = BLOCKS,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `product`.

    Args:
        eased: the slack may be other than 0.
        blocks: sizes of a tile, multiples of 16; change the speed alone.

    Returns:
        The result; (−least, largest) value of it before it was rounded, [2] fp32, −inf if it is not to be observed, inf
        as the largest if any is NaN; and where it was outside its range, bool of its shape, if gated.
    """
    from pipeline_lib.transforms.optical.grid import TAG

    rows = left.shape[-2] if not linear else left[..., 0].numel()
    a = left.reshape(1, rows, left.shape[-1]) if linear else left.reshape(-1, *left.shape[-2:])
    b = right.t()[None] if linear else right.reshape(-1, *right.shape[-2:])
    columns = b.shape[-1]
    y = left.new_empty(*left.shape[:-1], columns)
    outside = torch.empty(y.shape if gate else 0, dtype=torch.int8, device=y.device)
    seen = torch.full((2,), -torch.inf, device=y.device)
    key, row, vector = (ranges,) * 3 if draw is None else (draw.key, draw.first_row, draw.first_element)
    tiles = triton.cdiv(rows, blocks["BM"]) * triton.cdiv(columns, blocks["BN"])
    if y.numel():
        heads, first, second = _place(y, draw, linear)
        _product_kernel[(tiles, a.shape[0])](
            a, b, y, outside, seen, ranges, knobs, key, row, vector, lut_min or 0.0, heads, first, second,
            rows, columns, a.shape[-1], *a.stride(), *b.stride(),
            LINEAR=linear, DITHER=draw is not None, LUT=bool(lut_min), SLACK=eased, OBSERVE=observe, GATE=gate,
            TAG=TAG, **blocks, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return y, seen, outside.view(torch.bool)


def _place(y: Tensor, draw: Draw | None, linear: bool) -> tuple[int, int, int]:
    """(heads, first, second): vector z % heads · first + m · second of row z // heads; or m % heads of m // heads."""
    strides = () if draw is None or draw.strides is None else draw.strides
    if linear:
        return max(y[0, ..., 0].numel(), 1), 0, 0
    if len(strides) == 1:
        return 1, 0, strides[0]
    if len(strides) == 2:
        return y.shape[1], strides[0], strides[1]
    return 1, 0, 1
