"""Independent random bit flips of tensors of any 8-, 16- or 32-bit dtype, as a differentiable operation.

The definition of the stream stands in `flip_reference`, the probabilities in `flip_plan`. On a CPU the C kernel of
`flip_native` runs, on CUDA the Triton kernel of `flip_kernel`; both give the same bits.

With a zero-out threshold t an element x' after the flips is kept where |x'| < t and becomes 0 elsewhere, so NaN and
infinity become 0; this holds for all elements, flipped or not. The gradient passes straight through the flips, and
through the gate where the element was kept. No mask is stored: without a threshold backward needs nothing; with one it
draws the mask again over the saved input, unless forward saw (on a CPU) that nothing was zeroed.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pipeline_lib.numerics import flip_cpu as cpu
from pipeline_lib.numerics.flip_plan import FlipPlan, float_plan, make_plan
from pipeline_lib.numerics.flip_reference import Window
from pipeline_lib.numerics.philox import int64

__all__ = ["FlipPlan", "flip", "flip_", "make_plan", "plan_for"]


def plan_for(
    dtype: torch.dtype,
    p: float,
    p_exp: float | None = None,
    p_frac: float | None = None,
    p_bits: Mapping[int, float] | None = None,
) -> FlipPlan:
    """The plan for a dtype: every bit flips with `p`, but sign and exponent bits of floats with `p_exp` if given,
    fraction bits with `p_frac` if given, and each bit in `p_bits` (0 is the least significant) with its own.

    Raises:
        UserError: a probability outside [0, 1] or in (0, 2^-50).
        ValueError: a dtype that is no integer of 8, 16 or 32 bits, float32, float16 or bfloat16; a bit that it has not.
    """
    if p_bits:
        plan = plan_for(dtype, p, p_exp, p_frac)
        return _plan_by_bit(plan, {int(bit): float(own) for bit, own in p_bits.items()})
    if dtype.is_floating_point:
        name = str(dtype).removeprefix("torch.")
        return float_plan(name, p if p_exp is None else p_exp, p if p_frac is None else p_frac)
    if dtype.is_complex or dtype == torch.bool or dtype.itemsize not in cpu.SIGNED:
        raise ValueError(
            f"bits of {dtype} cannot flip; allowed: int8, int16, int32 and their like, and floats of 16, 32 bits"
        )
    bits = 8 * dtype.itemsize
    return make_plan(bits, [(2**bits - 1, p)])


def _plan_by_bit(plan: FlipPlan, p_bits: dict[int, float]) -> FlipPlan:
    if not all(0 <= bit < plan.bits for bit in p_bits):
        raise ValueError(f"an element of {plan.bits} bits has no bit {max(p_bits)}")
    by_bit = {
        bit: p for mask, p in zip(plan.masks, plan.probabilities, strict=True) for bit in range(32) if mask >> bit & 1
    }
    groups: dict[float, int] = {}
    for bit, p in sorted((by_bit | p_bits).items()):
        groups[p] = groups.get(p, 0) | 1 << bit
    return make_plan(plan.bits, [(mask, p) for p, mask in sorted(groups.items())])


def flip(
    x: Tensor,
    plan: FlipPlan,
    key: Tensor,
    first_row: Tensor | int = 0,
    first_element: Tensor | int = 0,
    *,
    threshold: float | None = None,
) -> Tensor:
    """`x` with random bits flipped, in new memory (contiguous); `x` itself if nothing can change.

    Args:
        x: [rows, elements...], any stride, also a DTensor; row i is row `first_row` + i of the stream.
        plan: for elements of the width of `x`, from `plan_for` or `make_plan`.
        key: 0-d int64, from `streams.step_key`.
        first_row: 0-d int64 or int.
        first_element: index within the row of each row's first element; 0-d int64 or int.
        threshold: zero-out threshold for floating-point `x`, None for no gate.

    Raises:
        ValueError: a plan of another width, a 0-d tensor, a threshold that is negative or given for integers.
    """
    _check(x, plan, threshold)
    if plan.is_identity and threshold is None:
        return x
    row = first_row if isinstance(first_row, Tensor) else int64(first_row, key)
    element = first_element if isinstance(first_element, Tensor) else int64(first_element, key)
    if type(x) is not Tensor and "torch.distributed.tensor" in sys.modules:
        from pipeline_lib.numerics.flip_sharded import DTensor, flip_sharded

        if isinstance(x, DTensor):
            return flip_sharded(x, plan, key, row, element, threshold)
    if torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter) or x.device.type == "meta":
        return _flip_op(x, key, row, element, plan.bits, plan.masks, plan.probabilities, threshold)
    # Eager: the same two functions without the 50 µs that a Python-defined operator costs at each call.
    if torch.is_grad_enabled() and x.requires_grad:
        return _Flip.apply(x, key, row, element, plan, threshold)  # type: ignore[no-any-return]
    return _flipped(x, key, row, element, plan, threshold)


@torch.no_grad()
def flip_(
    x: Tensor, plan: FlipPlan, key: Tensor, first_row: Tensor | int = 0, first_element: Tensor | int = 0
) -> Tensor:
    """Flip the bits of `x` [rows, elements...] in place and return it; the same call again restores it bit for bit.

    Not recorded by autograd: whoever flips a parameter in place flips it back before anyone else reads it. Not for
    DTensors.
    """
    _check(x, plan, None)
    if plan.is_identity or x.numel() == 0:
        return x
    row = first_row if isinstance(first_row, Tensor) else int64(first_row, key)
    element = first_element if isinstance(first_element, Tensor) else int64(first_element, key)
    data = x.detach()
    if not data.is_contiguous():
        return x.copy_(_flipped(data, key, row, element, plan, None))
    if data.device.type == "cuda":
        from pipeline_lib.numerics.flip_kernel import flip_cuda_

        flip_cuda_(data, key, row, element, plan)
    else:
        cpu.flip_in_place(data, _window(data, key, row, element), plan)
    torch.autograd.graph.increment_version(x)
    return x


def _check(x: Tensor, plan: FlipPlan, threshold: float | None) -> None:
    if x.dtype.itemsize * 8 != plan.bits:
        raise ValueError(f"a plan for elements of {plan.bits} bits cannot flip {x.dtype}")
    if x.dim() == 0:
        raise ValueError("bits flip in a tensor [rows, elements...], not in a 0-d one")
    if threshold is not None and not (x.dtype.is_floating_point and threshold >= 0):
        raise ValueError(f"zero-out threshold {threshold!r} for {x.dtype}: allowed is a number >= 0, for floats")


class _Flip(torch.autograd.Function):
    """The eager form of the operator: see the module's docstring."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, key: Tensor, row: Tensor, element: Tensor, plan: FlipPlan, threshold: float | None
    ) -> Tensor:
        ctx.plan, ctx.threshold, ctx.dropped = plan, threshold, True
        if x.device.type == "cuda":
            out = _flipped(x, key, row, element, plan, threshold)
        else:
            out, ctx.dropped = cpu.flipped(x, _window(x, key, row, element), plan, threshold)
        if threshold is not None:  # also if nothing was zeroed: checkpointing wants the same number every time
            ctx.save_for_backward(x, key, row, element)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.threshold is not None and ctx.dropped:
            grad = _Gate.apply(grad, *ctx.saved_tensors, ctx.plan, ctx.threshold)  # type: ignore[assignment]
        return grad, None, None, None, None, None


class _Gate(torch.autograd.Function):
    """The gradient's way through the gate, which is linear: its own derivative is the same gate."""

    @staticmethod
    def forward(
        ctx: Any, grad: Tensor, x: Tensor, key: Tensor, row: Tensor, element: Tensor, plan: FlipPlan, threshold: float
    ) -> Tensor:
        ctx.plan, ctx.threshold = plan, threshold
        ctx.save_for_backward(x, key, row, element)
        return _gated_gradient(grad, x, key, row, element, plan, threshold)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _Gate.apply(grad, *ctx.saved_tensors, ctx.plan, ctx.threshold), *(None,) * 6  # type: ignore[return-value]


@torch.library.custom_op("errata::flip", mutates_args=())
def _flip_op(
    x: Tensor,
    key: Tensor,
    row: Tensor,
    element: Tensor,
    bits: int,
    masks: list[int],
    probabilities: list[float],
    threshold: float | None,
) -> Tensor:
    """The operator that `torch.compile` and fake tensors see."""
    return _flipped(x, key, row, element, _plan(bits, masks, probabilities), threshold)


@torch.library.custom_op("errata::flip_gradient", mutates_args=())
def _flip_gradient_op(
    grad: Tensor,
    x: Tensor,
    key: Tensor,
    row: Tensor,
    element: Tensor,
    bits: int,
    masks: list[int],
    probabilities: list[float],
    threshold: float,
) -> Tensor:
    """grad * [|x'| < threshold] with x' drawn again."""
    return _gated_gradient(grad, x, key, row, element, _plan(bits, masks, probabilities), threshold)


@_flip_op.register_fake
def _(x: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_flip_gradient_op.register_fake
def _(grad: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(grad, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, key, row, element, *ctx.plan, ctx.threshold = inputs
    if ctx.threshold is not None:
        ctx.save_for_backward(x, key, row, element)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.threshold is not None:
        grad = _flip_gradient_op(grad, *ctx.saved_tensors, *ctx.plan, ctx.threshold)
    return grad, None, None, None, None, None, None, None


_flip_op.register_autograd(_backward, setup_context=_save)


def _save_gate(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, x, key, row, element, *ctx.others = inputs
    ctx.save_for_backward(x, key, row, element)


def _gate_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _flip_gradient_op(grad, *ctx.saved_tensors, *ctx.others), *(None,) * 8


_flip_gradient_op.register_autograd(_gate_backward, setup_context=_save_gate)


def _plan(bits: int, masks: list[int], probabilities: list[float]) -> FlipPlan:
    return make_plan(bits, list(zip(masks, probabilities, strict=True)))


def _flipped(x: Tensor, key: Tensor, row: Tensor, element: Tensor, plan: FlipPlan, threshold: float | None) -> Tensor:
    """Forward on real tensors."""
    if x.device.type == "cuda":
        from pipeline_lib.numerics.flip_kernel import flip_into_new

        return flip_into_new(x, key, row, element, plan, _gate_bits(threshold, x))
    return cpu.flipped(x, _window(x, key, row, element), plan, threshold)[0]


def _gated_gradient(
    grad: Tensor, x: Tensor, key: Tensor, row: Tensor, element: Tensor, plan: FlipPlan, threshold: float
) -> Tensor:
    """Backward on real tensors: the mask is drawn again."""
    if x.device.type == "cuda":
        from pipeline_lib.numerics.flip_kernel import flip_into_new

        return flip_into_new(x, key, row, element, plan, _gate_bits(threshold, x), grad)
    return cpu.gated_gradient(grad, x, _window(x, key, row, element), plan, threshold)


def _gate_bits(threshold: float | None, x: Tensor) -> int | None:
    return None if threshold is None else cpu.threshold_bits(threshold, x.dtype)


def _window(x: Tensor, key: Tensor, row: Tensor, element: Tensor) -> Window:
    rows = x.shape[0]
    return Window(int(key), int(row), rows, int(element), x.numel() // max(rows, 1))
