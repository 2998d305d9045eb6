"""Rounding to levels within a range, and the dither: the definition of what the machine does to a value.

With range [m, M], S steps between its levels and noise d, in fp32 and in this order:

    u = round((clamp(x, m, M) − m) · (S / (M − m)) + d)     half to even; then clamped to 0 … S where there is noise
    y = u · ((M − m) / S) + m

(Anderson et al., 2023, arXiv 2302.10360, appendix on the quantised simulation; zero is in general no level.) With a
look-up table whose smallest magnitudes are l·|M| above and l·|m| below zero, y in (0, l·M) becomes l·M and y in
(−l·|m|, 0) becomes −l·|m|; exact zeros stay. A range that is not known yet (m > M) changes nothing; one of no width,
or of less than 2⁻¹⁰⁰, where S / (M − m) would soon be infinite, gives m.

The noise of an element is (h + ½)/2¹⁶ − ½ with h of 16 random bits: it has mean zero, and no tie is ever drawn. h is
half word f mod 8 (lower halves first) of Philox4x32-10 at counter (⌊f/8⌋, vector, row, tag) under the draw's key, f
being the element's place in its vector; see `Draw`.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline_lib.numerics.philox import philox4x32, philox4x32_numpy, split_key
from pipeline_lib.transforms.base import Draw
from pipeline_lib.transforms.draws import vectors

TAG = 0x6F707469  # "opti": counter word 3, apart from every other tag
PER_CALL = 8
NARROW = 2.0**-100  # from here on a range has a width
_CHUNK = 2**15  # elements rounded at a time on a CPU: they stay in the cache of a core

if sys.byteorder != "little":
    raise ImportError("the halves of random words are read in place, which needs a little-endian machine")


class Grid(NamedTuple):
    """The levels of one operand or result; all fp32, 0-d tensors, or floats that fp32 holds.

    Attributes:
        low, high: the range; low > high if it is not known.
        scale: steps / (high − low), 0 where there is no width.
        step: (high − low) / steps.
        steps: one less than the levels.
        slack: share of the rounding that is taken back, y becomes y − (y − x)·slack; 0 for none.
        below, above: −l·|low| and l·high of a look-up table, 0 without one.
    """

    low: Tensor | float
    high: Tensor | float
    scale: Tensor | float
    step: Tensor | float
    steps: Tensor | float
    slack: Tensor | float
    below: Tensor | float
    above: Tensor | float


def grids(ranges: Tensor, knobs: Tensor, lut_min: float | None) -> list[Grid]:
    """Of the left operand, the right operand (which has the look-up table) and the result.

    Args:
        ranges: [3, 2] fp32, least and largest value.
        knobs: [3] fp32, steps of operands, steps of the result, slack.
    """
    low, high = ranges[:, 0], ranges[:, 1]
    span, steps = high - low, torch.stack([knobs[0], knobs[0], knobs[1]])
    share = torch.zeros_like(low)
    share[1] = lut_min or 0.0
    scale = torch.where(span >= NARROW, steps / span, 0.0)
    end = torch.where(low <= high, share, 0.0)
    below, above = torch.where(end > 0, -end * low.abs(), 0.0), torch.where(end > 0, end * high, 0.0)
    table = torch.stack([low, high, scale, span / steps, steps, knobs[2].expand(3), below, above])
    columns = table.t().tolist() if table.device.type == "cpu" else [column.unbind() for column in table.unbind(1)]
    return [Grid(*column) for column in columns]


def quantise(value: Tensor, grid: Grid) -> Tensor:
    """`value` on the levels of `grid`, without noise: new memory, fp32, in its shape. See the module."""
    value = value.detach()
    if value.ndim > 1 and not value.is_contiguous() and value.mT.is_contiguous():
        return quantise(value.mT, grid).mT
    if isinstance(grid.low, Tensor):
        return torch.where(grid.low <= grid.high, _round(value.float(), grid), value.float())
    if not grid.low <= grid.high:
        return value.float().clone()
    out = torch.empty(value.shape, dtype=torch.float32)
    source, target = value.reshape(-1), out.view(-1)
    for first in range(0, source.numel(), _CHUNK):
        part = slice(first, first + _CHUNK)
        _round(source[part].float(), grid, out=target[part])
    return out


def quantise_result(value: Tensor, grid: Grid, draw: Draw | None) -> Tensor:
    """`value`, fp32 [rows, …, features] and contiguous, on the levels of `grid` with the noise of `draw`.

    On a CPU it is overwritten.
    """
    if isinstance(grid.low, Tensor):
        noise = None if draw is None else dither(draw, value.shape)
        return torch.where(grid.low <= grid.high, _round(value, grid, noise), value)
    if grid.low <= grid.high:
        features = value.shape[-1]
        flat = value.view(-1, features)
        size = max(_CHUNK // features, 1)
        row, vector = _numbers(draw, value.shape) if draw is not None else (None, None)
        for first in range(0, len(flat), size):
            vectors_here, noise = flat[first : first + size], None
            if draw is not None and row is not None and vector is not None:
                here = slice(first, first + size)
                noise = _dither(row[here], vector[here], features, int(draw.key))
            _round(vectors_here, grid, noise, out=vectors_here)
    return value


def _round(value: Tensor, grid: Grid, noise: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """See the module; `out` may be `value`."""
    exact = value.clone() if out is value and grid.slack else value
    y: Tensor = torch.clamp(value, grid.low, grid.high, out=out)  # type: ignore[call-overload]
    y.sub_(grid.low).mul_(grid.scale)
    if noise is not None:
        y.add_(noise)
    y.round_()
    if noise is not None:
        y.clamp_(torch.zeros_like(grid.steps) if isinstance(grid.steps, Tensor) else 0.0, grid.steps)  # type: ignore[call-overload]
    y.mul_(grid.step).add_(grid.low)
    if isinstance(grid.above, Tensor) or grid.above != 0 or grid.below != 0:
        y.masked_fill_((y > 0) & (y < grid.above), grid.above)
        y.masked_fill_((y < 0) & (y > grid.below), grid.below)
    if isinstance(grid.slack, Tensor) or grid.slack:
        y.sub_((y - exact) * grid.slack)
    return y


def dither(draw: Draw, shape: torch.Size) -> Tensor:
    """The noise of a result in `shape` = [rows, …, features], fp32 in (−½, ½). See the module."""
    features = shape[-1]
    if draw.key.device.type == "cpu":
        row, vector = _numbers(draw, shape)
        return _dither(row, vector, features, int(draw.key)).view(shape)
    return _dither_of_tensors(draw, shape)


def _dither_of_tensors(draw: Draw, shape: torch.Size) -> Tensor:
    features = shape[-1]
    row, vector = (number[..., None] for number in vectors(draw, shape))
    call = torch.arange(-(-features // PER_CALL), device=draw.key.device)
    tag = torch.full((), TAG, dtype=torch.int64, device=draw.key.device)
    words = torch.stack(philox4x32(call, vector, row, tag, *split_key(draw.key)), -1)
    halves = torch.stack([words & 0xFFFF, words >> 16], -1).flatten(-3)[..., :features]
    return halves.float().add_(0.5).mul_(2.0**-16).sub_(0.5)


def _numbers(draw: Draw, shape: torch.Size) -> tuple[np.ndarray, np.ndarray]:
    """Row and vector of every vector of the result, each flat."""
    row, vector = vectors(draw, shape)
    return tuple(number.expand(shape[:-1]).reshape(-1).numpy() for number in (row, vector))  # type: ignore[return-value]


def _dither(row: np.ndarray, vector: np.ndarray, features: int, key: int) -> Tensor:
    """[vectors, features], on the CPU."""
    calls = -(-features // PER_CALL)
    even = np.empty((2, len(row), calls), np.uint64)
    odd = np.empty((2, len(row), calls), np.uint32)
    even[0], even[1] = np.arange(calls, dtype=np.uint64), row[:, None]
    odd[0], odd[1] = vector[:, None], TAG
    words = np.empty((len(row) * calls, 4), np.uint32)
    (words[:, 0], words[:, 2]), (words[:, 1], words[:, 3]) = philox4x32_numpy(
        even.reshape(2, -1), odd.reshape(2, -1), key
    )
    halves = torch.from_numpy(words.view(np.uint16).reshape(len(row), calls * PER_CALL)[:, :features])
    return halves.float().add_(0.5).mul_(2.0**-16).sub_(0.5)
