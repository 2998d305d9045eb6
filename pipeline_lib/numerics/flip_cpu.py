"""Bit flips and the zero-out gate on CPU tensors: the C kernel, or where it cannot be built the numpy reference."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from pipeline_lib.numerics import flip_native as native
from pipeline_lib.numerics.flip_plan import FlipPlan
from pipeline_lib.numerics.flip_reference import Window, flip_array

SIGNED = {1: torch.int8, 2: torch.int16, 4: torch.int32}
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def flipped(x: Tensor, window: Window, plan: FlipPlan, threshold: float | None) -> tuple[Tensor, bool]:
    """A contiguous copy of `x` with flips and gate, and whether the gate zeroed any element."""
    x = x.detach()
    out = x.clone(memory_format=torch.contiguous_format) if not x.is_contiguous() else torch.empty_like(x)
    gate = None if threshold is None else threshold_bits(threshold, x.dtype)
    source = x if x.is_contiguous() else out
    if native.is_available():
        return out, native.flip_memory(source.data_ptr(), out.data_ptr(), plan, window, gate)
    bits = _bits(out.copy_(source))
    flip_array(bits, plan, window)
    if gate is None:
        return out, False
    dropped = _reaches(bits, gate)
    bits[dropped] = 0
    return out, bool(dropped.any())


def flip_in_place(x: Tensor, window: Window, plan: FlipPlan) -> None:
    """Flip contiguous `x` in place."""
    if native.is_available():
        native.flip_memory(x.data_ptr(), x.data_ptr(), plan, window)
    else:
        flip_array(_bits(x), plan, window)


def gated_gradient(grad: Tensor, x: Tensor, window: Window, plan: FlipPlan, threshold: float) -> Tensor:
    """A contiguous `grad`, zero where the gate zeroes `x` after its flips, which are drawn again."""
    grad, x = grad.detach().contiguous(), x.detach().contiguous()
    gate = threshold_bits(threshold, x.dtype)
    out = torch.empty_like(grad)
    if native.is_available():
        native.flip_memory(x.data_ptr(), out.data_ptr(), plan, window, gate, grad.data_ptr())
    else:
        flips = x.clone()
        flip_array(_bits(flips), plan, window)
        _bits(out.copy_(grad))[_reaches(_bits(flips), gate)] = 0
    return out


def _bits(x: Tensor) -> np.ndarray:
    """The memory of a contiguous CPU tensor as a flat unsigned array."""
    size = x.dtype.itemsize
    return x.view(SIGNED[size]).numpy().reshape(-1).view(_UNSIGNED[size])


def _reaches(bits: np.ndarray, gate: int) -> np.ndarray:
    """Where not |x'| < threshold: non-negative floats are ordered like their bits, infinity and then NaN above all."""
    return (bits & bits.dtype.type((1 << 8 * bits.itemsize - 1) - 1)) >= bits.dtype.type(gate)


@lru_cache(maxsize=256)
def threshold_bits(threshold: float, dtype: torch.dtype) -> int:
    """The bit pattern of the smallest value of `dtype` that is not below `threshold`: the same gate, exactly."""
    nearest = torch.tensor(threshold, dtype=torch.float64).to(dtype)
    pattern = int(nearest.view(SIGNED[dtype.itemsize]))
    return pattern + (math.isfinite(float(nearest)) and float(nearest) < threshold)
