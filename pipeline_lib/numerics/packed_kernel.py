"""Triton kernels of the linear product with a packed weight, on CUDA.

Words of 32 bits are read along the input features, so that neither weights nor scales are ever transposed or copied,
and each word is read once a tile. One row goes through `_row_kernel`, which multiplies and sums without tensor cores;
more rows go through `_tile_kernel`, whose decoded tiles feed them. Where the tiles are too few for the device the input
features are divided, and the parts are added in a fixed order: the same input gives the same output.

Imported only where it is used: by CUDA tensors, and by tests under Triton's interpreter (TRITON_INTERPRET=1).
"""

# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false
# (kernels are Python that Triton compiles; a type checker sees only their surface)

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _zeros_of(zero, row, group, groups, inside, BITS: tl.constexpr):
    # Zero points lie in bytes, packed like codes.
    PER: tl.constexpr = 8 // BITS
    byte = tl.load(zero + row * ((groups + PER - 1) // PER) + group // PER, mask=inside, other=0)
    return ((byte >> ((group % PER) * BITS).to(tl.uint8)) & ((1 << BITS) - 1)).to(tl.float32)


@triton.jit
def _row_kernel(
    x, words, scale, zero, bias, out, N, K, GROUP, groups,
    HAS_BIAS: tl.constexpr, BITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """out[m, n] for m = program 1 and BLOCK_N columns; BLOCK_W words of each at a time."""
    PER: tl.constexpr = 32 // BITS
    m = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = n.to(tl.int64)[:, None]
    shift = (tl.arange(0, PER) * BITS).to(tl.uint32)
    width = K // PER
    total = tl.zeros([BLOCK_N, BLOCK_W], tl.float32)
    for first in range(0, width, BLOCK_W):
        w = first + tl.arange(0, BLOCK_W)
        inside = (n < N)[:, None] & (w < width)[None, :]
        word = tl.load(words + row * width + w[None, :], mask=inside, other=0).to(tl.uint32, bitcast=True)
        at = w[:, None] * PER + tl.arange(0, PER)[None, :]
        value = tl.load(x + m * K + at, mask=at < K, other=0).to(tl.float32)
        code = ((word[:, :, None] >> shift[None, None, :]) & ((1 << BITS) - 1)).to(tl.float32)
        # A word lies within one group, so its scale and zero point come after the sum.
        part = tl.sum(code * value[None, :, :], 2)
        group = (w * PER // GROUP)[None, :]
        s = tl.load(scale + row * groups + group, mask=inside, other=0).to(tl.float32)
        z = _zeros_of(zero, row, group, groups, inside, BITS)
        total += s * (part - z * tl.sum(value, 1)[None, :])
    y = tl.sum(total, 1)
    if HAS_BIAS:
        y += tl.load(bias + n, mask=n < N, other=0).to(tl.float32)
    tl.store(out + m * N + n, y.to(out.dtype.element_ty), mask=n < N)


@triton.jit
def _tile_kernel(
    x, words, scale, zero, bias, out, M, N, K, GROUP, groups, span,
    HAS_BIAS: tl.constexpr, BITS: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A BLOCK_M × BLOCK_N tile of out[part], over `span` input features from part · span on; part = program 1."""
    PER: tl.constexpr = 32 // BITS
    BLOCK_W: tl.constexpr = BLOCK_K // PER
    columns = tl.cdiv(N, BLOCK_N)
    m = (tl.program_id(0) // columns) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tl.program_id(0) % columns) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(1)
    row = n.to(tl.int64)[:, None]
    shift = (tl.arange(0, PER) * BITS).to(tl.uint32)
    width = K // PER
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(part * span, tl.minimum((part + 1) * span, K), BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        a = tl.load(x + m.to(tl.int64)[:, None] * K + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0)
        w = first // PER + tl.arange(0, BLOCK_W)
        inside = (n < N)[:, None] & (w < width)[None, :]
        word = tl.load(words + row * width + w[None, :], mask=inside, other=0).to(tl.uint32, bitcast=True)
        group = (w * PER // GROUP)[None, :]
        s = tl.load(scale + row * groups + group, mask=inside, other=0).to(tl.float32)
        z = _zeros_of(zero, row, group, groups, inside, BITS)
        code = ((word[:, :, None] >> shift[None, None, :]) & ((1 << BITS) - 1)).to(tl.float32)
        b = tl.reshape((code - z[:, :, None]) * s[:, :, None], [BLOCK_N, BLOCK_K]).to(x.dtype.element_ty)
        if WIDEN:  # Triton's interpreter has no product of bf16
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, tl.trans(b), total, input_precision=PRECISION)
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n < N, other=0).to(tl.float32)[None, :]
    place = (part.to(tl.int64) * M + m)[:, None] * N + n[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


@dataclass(frozen=True)
class Launch:
    """Block sizes of a launch; they change the order of sums and the speed, nothing else.

    Attributes:
        block_m: rows of a tile; 1 is the kernel without tensor cores.
        block_n: output features of a program.
        block_k: input features read at a time.
        parts: into how many the input features are divided.
        warps: of 32 threads, a program.
        stages: of the software pipeline.
    """

    block_m: int
    block_n: int
    block_k: int
    parts: int = 1
    warps: int = 4
    stages: int = 3


def launch_for(rows: int, count: int, features: int, bits: int, processors: int) -> Launch:
    """The launch for a shape on a device with so many multiprocessors. Untuned: chosen from the shapes alone."""
    if rows == 1:
        block_n = 16 if count >= 16 * 4 * processors else 4
        return Launch(1, block_n, min(1024, _power_of_2(features)) if bits == 2 else 256, 1, 4, 2)
    block_m = 16 if rows <= 16 else 32 if rows <= 32 else 64
    block_n = 32 if rows <= 64 else 64
    tiles = -(-rows // block_m) * -(-count // block_n)
    block_k = 128 if rows <= 64 else 64
    parts = max(1, min(2 * processors // tiles, features // (4 * block_k), 8))
    return Launch(block_m, block_n, block_k, parts, 4, 3)


def run(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, bits: int, group_size: int, how: Launch
) -> Tensor:
    """See `packed_linear.packed_linear`; rows and groups must consist of whole words."""
    count, features = codes.shape[0], x.shape[-1]
    x_MK = x.detach().reshape(-1, features).contiguous()
    rows = len(x_MK)
    words = codes.contiguous().view(torch.int32)
    scale, zero = scale.contiguous(), zero.contiguous()
    groups, size = scale.shape[1], min(group_size, features)
    y_MN = torch.empty(rows, count, dtype=x.dtype, device=x.device)
    given = y_MN if bias is None else bias.detach().contiguous()
    if how.block_m == 1:
        _row_kernel[(triton.cdiv(count, how.block_n), rows)](
            x_MK, words, scale, zero, given, y_MN, count, features, size, groups,
            HAS_BIAS=bias is not None, BITS=bits, BLOCK_N=how.block_n, BLOCK_W=how.block_k * bits // 32,
            num_warps=how.warps, num_stages=how.stages,
        )  # fmt: skip
        return y_MN.view(*x.shape[:-1], count)
    span = triton.cdiv(triton.cdiv(features, how.block_k), how.parts) * how.block_k
    parts = triton.cdiv(features, span)
    out = y_MN if parts == 1 else torch.empty(parts, rows, count, dtype=torch.float32, device=x.device)
    _tile_kernel[(triton.cdiv(rows, how.block_m) * triton.cdiv(count, how.block_n), parts)](
        x_MK, words, scale, zero, given, out, rows, count, features, size, groups, span,
        HAS_BIAS=bias is not None and parts == 1, BITS=bits,
        PRECISION="ieee", WIDEN=x.dtype == torch.bfloat16 and triton.knobs.runtime.interpret,
        BLOCK_M=how.block_m, BLOCK_N=how.block_n, BLOCK_K=how.block_k, num_warps=how.warps, num_stages=how.stages,
    )  # fmt: skip
    if parts > 1:
        summed = out.sum(0)
        y_MN = (summed if bias is None else summed + given.float()).to(x.dtype)
    return y_MN.view(*x.shape[:-1], count)


def packed_linear_cuda(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, bits: int, group_size: int
) -> Tensor:
    """See `packed_linear.packed_linear`, on the device of `x`."""
    rows = x.numel() // x.shape[-1]
    with torch.cuda.device(x.device):
        how = launch_for(rows, codes.shape[0], x.shape[-1], bits, _processors(x.device))
        return run(x, codes, scale, zero, bias, bits, group_size, how)


@lru_cache(maxsize=16)
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _power_of_2(number: int) -> int:
    return triton.next_power_of_2(number)
