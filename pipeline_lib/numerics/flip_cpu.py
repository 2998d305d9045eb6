"""Bit flips and the zero-out gate on CPU tensors: the reference on their memory."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from pipeline_lib.numerics.flip_plan import FlipPlan
from pipeline_lib.numerics.flip_reference import Window, flip_array

SIGNED = {1: torch.int8, 2: torch.int16, 4: torch.int32}
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32}
_NONE = np.zeros(0, np.int64)


def flipped(x: Tensor, window: Window, plan: FlipPlan, threshold: float | None) -> tuple[Tensor, np.ndarray]:
    """A contiguous copy of `x` with flips and gate, and the flat indices of the elements that the gate zeroed."""
    x = x.detach()
    out = x.clone(memory_format=torch.contiguous_format)
    if out.numel() == 0:
        return out, _NONE
    bits = _bits(out)
    touched = flip_array(bits, plan, window)
    if threshold is None:
        return out, _NONE
    if touched is not None and _all_below(x, threshold):  # then only a flip can have reached the threshold
        dropped = touched[_reaches(bits[touched], threshold, x.dtype)]
    else:
        dropped = np.flatnonzero(_reaches(bits, threshold, x.dtype))
    bits[dropped] = 0
    return out, dropped


def flip_in_place(x: Tensor, window: Window, plan: FlipPlan) -> None:
    """Flip contiguous `x` in place."""
    flip_array(_bits(x), plan, window)


def without(x: Tensor, dropped: np.ndarray) -> Tensor:
    """A contiguous copy of `x` with zeros at flat indices; differentiable."""
    return x.reshape(-1).index_fill(0, torch.from_numpy(dropped), 0).view(x.shape)


def _bits(x: Tensor) -> np.ndarray:
    """The memory of a contiguous CPU tensor as a flat unsigned array."""
    size = x.dtype.itemsize
    return x.view(SIGNED[size]).numpy().reshape(-1).view(_UNSIGNED[size])


def _all_below(x: Tensor, threshold: float) -> bool:
    low, high = torch.aminmax(x)
    return -threshold < float(low) and float(high) < threshold  # NaN compares false


def _reaches(bits: np.ndarray, threshold: float, dtype: torch.dtype) -> np.ndarray:
    """Where not |x'| < threshold: non-negative floats are ordered like their bits, infinity and then NaN above all."""
    magnitude = bits & bits.dtype.type((1 << 8 * bits.itemsize - 1) - 1)
    return magnitude >= bits.dtype.type(threshold_bits(threshold, dtype))


@lru_cache(maxsize=256)
def threshold_bits(threshold: float, dtype: torch.dtype) -> int:
    """The bit pattern of the smallest value of `dtype` that is not below `threshold`: the same gate, exactly."""
    nearest = torch.tensor(threshold, dtype=torch.float64).to(dtype)
    pattern = int(nearest.view(SIGNED[dtype.itemsize]))
    return pattern + (math.isfinite(float(nearest)) and float(nearest) < threshold)
