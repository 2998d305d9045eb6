"""Triton kernels of `ternary_linear`: bytes are unpacked in registers, digit by digit, and multiplied at once.

The digit i of the bytes b belongs to the weights b·D + i (D codes a byte), so a tile of bytes meets every D-th column
of x: one product for each digit, no shuffling. Sums are fp32.

Imported only where it is used: by CUDA tensors, and by tests under Triton's interpreter (TRITON_INTERPRET=1).
"""

# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAssignmentType=false
# (kernels are Python that Triton compiles; a type checker sees only their surface)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline_lib.numerics.trits import PER_BYTE, Layout, group_width


@triton.jit
def _codes(byte, DIGIT: tl.constexpr, D: tl.constexpr):
    """The codes -1, 0, 1 (fp32) in one place of the bytes; see `numerics.trits` for the layouts."""
    word = byte.to(tl.int32)
    if D == 5:
        place: tl.constexpr = 81 if DIGIT == 0 else 27 if DIGIT == 1 else 9 if DIGIT == 2 else 3 if DIGIT == 3 else 1
        digit = (tl.minimum(word, 242) // place) % 3
    else:
        digit = tl.minimum((word >> (2 * DIGIT)) & 3, 2)
    return (digit - 1).to(tl.float32)


@triton.jit
def _bytes(packed, n, b, N, BYTES):
    """The bytes b of the rows n."""
    inside = (n[:, None] < N) & (b[None, :] < BYTES)
    return tl.load(packed + n.to(tl.int64)[:, None] * BYTES + b[None, :], mask=inside, other=0)


@triton.jit
def _weights(byte, scale, n, k, N, K, GROUPS, WIDTH, GROUPED: tl.constexpr, DIGIT: tl.constexpr, D: tl.constexpr):
    """The weights of the rows n and columns k in one place of the bytes (fp32), without a tensor's or a row's scale."""
    w_NB = _codes(byte, DIGIT, D)
    if GROUPED:
        at = n[:, None] * GROUPS + (k // WIDTH)[None, :]
        w_NB *= tl.load(scale + at, mask=(n[:, None] < N) & (k[None, :] < K), other=0.0).to(tl.float32)
    return w_NB


@triton.jit
def _forward_kernel(
    x, packed, scale, y, M, N, K, BYTES, GROUPS, WIDTH,
    PER_TENSOR: tl.constexpr, GROUPED: tl.constexpr, D: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    # y[m, n] = Σ_k x[m, k]·w[n, k]
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    row = m.to(tl.int64)[:, None] * K
    total = tl.zeros([BM, BN], tl.float32)
    for b0 in range(0, BYTES, BB):
        b = b0 + tl.arange(0, BB)
        byte = _bytes(packed, n, b, N, BYTES)
        for digit in tl.static_range(D):
            k = b * D + digit
            x_MB = tl.load(x + row + k[None, :], mask=(m[:, None] < M) & (k[None, :] < K), other=0.0)
            w_NB = _weights(byte, scale, n, k, N, K, GROUPS, WIDTH, GROUPED, digit, D)
            total = tl.dot(x_MB, tl.trans(w_NB.to(x_MB.dtype)), total, input_precision="ieee")
    if PER_TENSOR:
        total *= tl.load(scale).to(tl.float32)
    elif not GROUPED:
        total *= tl.load(scale + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(y + m.to(tl.int64)[:, None] * N + n[None, :], total, mask=(m[:, None] < M) & (n[None, :] < N))


@triton.jit
def _row_kernel(
    x, packed, scale, y, N, K, BYTES, GROUPS, WIDTH,
    PER_TENSOR: tl.constexpr, GROUPED: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    # The same for few rows of x, one a program: reading the weight is all there is to do, so no tensor cores.
    m = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros([BN, BB], tl.float32)
    for b0 in range(0, BYTES, BB):
        b = b0 + tl.arange(0, BB)
        byte = _bytes(packed, n, b, N, BYTES)
        for digit in tl.static_range(D):
            k = b * D + digit
            x_B = tl.load(x + m * K + k, mask=k < K, other=0.0).to(tl.float32)
            w_NB = _weights(byte, scale, n, k, N, K, GROUPS, WIDTH, GROUPED, digit, D)
            total += w_NB * x_B[None, :]
    y_N = tl.sum(total, 1)
    if PER_TENSOR:
        y_N *= tl.load(scale).to(tl.float32)
    elif not GROUPED:
        y_N *= tl.load(scale + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(y + m * N + n, y_N, mask=n < N)


@triton.jit
def _gradient_kernel(
    g, packed, scale, out, M, N, K, BYTES, GROUPS, WIDTH,
    PER_TENSOR: tl.constexpr, GROUPED: tl.constexpr, D: tl.constexpr,
    DIGIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    # out[m, k] = Σ_n g[m, n]·w[n, k] for the columns k = b·D + DIGIT
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    b = tl.program_id(1) * BB + tl.arange(0, BB)
    k = b * D + DIGIT
    total = tl.zeros([BM, BB], tl.float32)
    for n0 in range(0, N, BN):
        n = n0 + tl.arange(0, BN)
        g_MN = tl.load(
            g + m.to(tl.int64)[:, None] * N + n[None, :], mask=(m[:, None] < M) & (n[None, :] < N), other=0.0
        )
        byte = _bytes(packed, n, b, N, BYTES)
        w_NB = _weights(byte, scale, n, k, N, K, GROUPS, WIDTH, GROUPED, DIGIT, D)
        if not GROUPED and not PER_TENSOR:
            w_NB *= tl.load(scale + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
        total = tl.dot(g_MN, w_NB.to(g_MN.dtype), total, input_precision="ieee")
    if PER_TENSOR:
        total *= tl.load(scale).to(tl.float32)
    tl.store(out + m.to(tl.int64)[:, None] * K + k[None, :], total, mask=(m[:, None] < M) & (k[None, :] < K))


FEW = 4
"""Rows of x up to which the kernel without tensor cores is taken."""


def forward(x: Tensor, packed: Tensor, scale: Tensor, layout: Layout, group_size: int | None) -> Tensor:
    """[n, out] from x [n, features], packed [out, bytes] and scale."""
    x = x.contiguous()
    rows, features = x.shape
    y = x.new_empty(rows, len(packed))
    sizes = _sizes(packed, scale, features, layout, group_size)
    with torch.cuda.device_of(x):  # not the current one in every process of several GPUs
        if rows <= FEW:
            grid = (rows, triton.cdiv(len(packed), 16))
            _row_kernel[grid](x, packed, scale, y, len(packed), features, **sizes, BN=16, BB=64)
        else:
            grid = (triton.cdiv(rows, 64), triton.cdiv(len(packed), 64))
            _forward_kernel[grid](x, packed, scale, y, rows, len(packed), features, **sizes, BM=64, BN=64, BB=32)
    return y


def input_gradient(
    gradient: Tensor, packed: Tensor, scale: Tensor, features: int, layout: Layout, group_size: int | None
) -> Tensor:
    """[n, features] from the gradient [n, out] of the output."""
    gradient = gradient.contiguous()
    rows, outputs = gradient.shape
    out = gradient.new_empty(rows, features)
    sizes = _sizes(packed, scale, features, layout, group_size)
    grid = (triton.cdiv(rows, 64), triton.cdiv(packed.shape[1], 64))
    with torch.cuda.device_of(gradient):
        for digit in range(PER_BYTE[layout]):
            _gradient_kernel[grid](
                gradient, packed, scale, out, rows, outputs, features, **sizes, DIGIT=digit, BM=64, BN=32, BB=64
            )
    return out


def _sizes(packed: Tensor, scale: Tensor, features: int, layout: Layout, group_size: int | None) -> dict[str, int]:
    groups = scale.shape[1]
    return {
        "BYTES": packed.shape[1],
        "GROUPS": groups,
        "WIDTH": group_width(features, group_size),
        "PER_TENSOR": scale.numel() == 1,
        "GROUPED": groups > 1,
        "D": PER_BYTE[layout],
    }
