"""Triton kernel of the bit-flip sampler: bit for bit the stream of `flip_reference`, on CUDA.

One program flips one tile of one row: it copies the tile with the constant and dense parts, waits, and then toggles the
sparse hits by atomic XOR on the 32-bit words of the output. No tile but its own is written, except that a word may
straddle two tiles where rows are not aligned to words; there the neighbour's bytes are toggled by zero. With a gate it
then reads its tile back from the L2 cache and zeroes it, or the gradient, where the flipped value is not below it.

Both groups of bits, copy and gate are one launch. Nothing is tuned: a launch is specialised on the plan's shape, the
width of elements, whether rows are multiples of 16 elements and whether the input is strided, never on a step.

Imported only where it is used: by CUDA tensors, and by tests under Triton's interpreter (TRITON_INTERPRET=1).
"""

# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false
# (kernels are Python that Triton compiles; a type checker sees only their surface)

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from pipeline_lib.numerics.flip_plan import TILE_WORDS, FlipPlan
from pipeline_lib.numerics.flip_triton import _flip_kernel, _step_key_kernel
from pipeline_lib.numerics.philox import as_signed

_SIGNED = {8: torch.int8, 16: torch.int16, 32: torch.int32}


@lru_cache(maxsize=256)
def _tables(plan: FlipPlan, device: torch.device) -> dict[str, Any]:
    """The plan as kernel arguments on a device."""
    length = max([16, *(len(c.thresholds) for c in plan.sparse)])
    length = triton.next_power_of_2(length)
    table = [[as_signed(t ^ 1 << 63) for t in c.thresholds] + [0] * (length - len(c.thresholds)) for c in plan.sparse]

    def tensor(values: list[Any], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values or [0], dtype=dtype, device=device)

    return {
        "constant": _signed32(plan.constant),
        "digits": tensor([_signed32(digit) for digit in plan.dense], torch.int32),
        "table": tensor(table, torch.int64),
        "bases": tensor([c.base for c in plan.sparse], torch.int32),
        "lengths": tensor([len(c.thresholds) for c in plan.sparse], torch.int32),
        "masks": tensor([c.mask & ((1 << plan.bits) - 1) for c in plan.sparse], torch.int64),
        "K": len(plan.dense),
        "COMPONENTS": len(plan.sparse),
        "LENGTH": length,
        "BITS": plan.bits,
    }


def _signed32(value: int) -> int:
    return value - 2**32 if value >= 2**31 else value


def launch(
    x: Tensor,
    out: Tensor,
    words: Tensor,
    key: Tensor,
    row: Tensor,
    element: Tensor,
    plan: FlipPlan,
    gate: int | None = None,
    gradient: Tensor | None = None,
    warps: int = 4,
    calls: int = 128,
) -> None:
    """Flip `x` into `out`.

    Args:
        x: [rows, elements...], of strides that `_strides` knows; viewed as integers of the plan's width.
        out: contiguous, or `x` itself.
        words: int32 view of the memory of `out`, up to a whole word.
        key, row, element: 0-d int64, on the device of `x`.
        gate: bit pattern of the zero-out threshold; None for no gate.
        gradient: contiguous; what is written where the flipped `x` passes the gate, instead of it.
        warps: of a program; calls: Philox calls for hits at a time. Both change the speed alone.
    """
    rows = x.shape[0]
    elements = x.numel() // rows
    # A tensor that starts inside a tile reaches into one tile more; where it starts only the device knows.
    tiles = triton.cdiv(elements, TILE_WORDS * 32 // plan.bits) + 1
    signed = _SIGNED[plan.bits]
    in_place = out.data_ptr() == x.data_ptr()
    strides = _strides(x)
    assert strides is not None, "copy it before"
    chosen = out if gradient is None else gradient
    _flip_kernel[(rows * tiles,)](
        x.view(signed), out.view(signed), words, chosen.view(signed), key, row, element, elements, tiles, *strides,
        -1 if gate is None else gate, **_tables(plan, x.device),
        COPY=bool(plan.constant) or not in_place or gate is not None,
        GATE=0 if gate is None else 1 if gradient is None else 2, STRIDED=not x.is_contiguous(), Q=calls, TW=TILE_WORDS,
        num_warps=warps,
    )  # fmt: skip


def _strides(x: Tensor) -> tuple[int, ...] | None:
    """(n1, n2, row stride, strides of three dimensions) of x seen as [rows, n0, n1, n2]; None if it takes more."""
    inner: list[list[int]] = []
    for size, stride in zip(x.shape[1:], x.stride()[1:], strict=True):
        if size == 1:
            continue
        if inner and inner[-1][1] == size * stride:  # neighbours that lie in memory as one dimension
            inner[-1] = [inner[-1][0] * size, stride]
        else:
            inner.append([size, stride])
    if len(inner) > 3:
        return None
    (_, s0), (n1, s1), (n2, s2) = [[1, 0]] * (3 - len(inner)) + inner
    return n1, n2, x.stride(0), s0, s1, s2


def flip_into_new(
    x: Tensor,
    key: Tensor,
    row: Tensor,
    element: Tensor,
    plan: FlipPlan,
    gate: int | None = None,
    gradient: Tensor | None = None,
) -> Tensor:
    """A flipped contiguous copy of `x`, gated, or the gated gradient: see `launch`."""
    x = x.detach()
    if _strides(x) is None:
        x = x.contiguous()
    if gradient is not None:
        gradient = gradient.detach().contiguous()
    size = x.numel() * x.element_size()
    words = torch.empty(triton.cdiv(size, 4), dtype=torch.int32, device=x.device)
    # A tensor of its own on the memory of the words: autograd lets nobody write to a view that a Function returns.
    out = torch.empty(0, dtype=x.dtype, device=x.device)
    out.set_(words.untyped_storage(), 0, x.shape, torch.empty(x.shape, device="meta").stride())
    if x.numel():
        with torch.cuda.device_of(x):
            launch(x, out, words, *(t.to(x.device) for t in (key, row, element)), plan, gate, gradient)
    return out


def flip_cuda_(x: Tensor, key: Tensor, row: Tensor, element: Tensor, plan: FlipPlan) -> None:
    """Flip contiguous `x` in place."""
    if (x.numel() * x.element_size()) % 4 or x.data_ptr() % 4:  # its words would reach beyond it
        x.copy_(flip_into_new(x, key, row, element, plan))
        return
    with torch.cuda.device(x.device):
        launch(x, x, x.view(-1).view(torch.int32), *(t.to(x.device) for t in (key, row, element)), plan)


def step_key_cuda(site_key: int, step: Tensor, tag: int) -> Tensor:
    """`streams.step_key` in one launch."""
    out = torch.empty_like(step)
    with torch.cuda.device(step.device):
        _step_key_kernel[(1,)](out, step, site_key, tag)
    return out
