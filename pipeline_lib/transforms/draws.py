"""Random numbers for faults, from a `Draw` alone: element by element, whatever else is in the batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pipeline_lib.numerics.philox import LOW, philox4x32, split_key
from pipeline_lib.transforms.base import Draw

_UNIFORM, _NORMAL = 0x756E6966, 0x6E6F726D  # "unif", "norm": counter word 3, apart from every tag of the bit flips


def uniform(draw: Draw, shape: torch.Size) -> Tensor:
    """Independent uniform numbers in [0, 1), multiples of 2⁻²⁴, float32 in `shape` = [rows, elements…].

    Word 0 of Philox4x32-10 at counter (element low, element high, row, tag) under the draw's key. A reference: some
    60 integer operations an element.
    """
    word, *_ = _words(draw, shape, _UNIFORM)
    return ((word >> 8).float() * 2.0**-24).view(shape)


def normals(draw: Draw, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Two standard normal numbers for each element, all independent, float32 in `shape` = [rows, elements…].

    Box and Muller ("A note on the generation of random normal deviates", 1958) on words 0 and 1 of a Philox4x32-10
    call as in `uniform`, under another tag. None is beyond 5.9. Devices agree but for the rounding of log, sin and cos.
    """
    word0, word1, *_ = _words(draw, shape, _NORMAL)
    radius = (((word0 >> 8).float() + 0.5) * 2.0**-24).log().mul(-2).sqrt()
    angle = (word1 >> 8).float() * (2.0**-24 * 2 * math.pi)
    return (radius * angle.cos()).view(shape), (radius * angle.sin()).view(shape)


def _words(draw: Draw, shape: torch.Size, tag: int) -> tuple[Tensor, ...]:
    """Four random words, int64 [rows, elements] of values below 2³²."""
    device = draw.key.device
    rows, elements = shape[0], shape[1:].numel()
    row = draw.first_row + torch.arange(rows, device=device)[:, None]
    element = draw.first_element + torch.arange(elements, device=device)[None]
    tags = torch.full((), tag, dtype=torch.int64, device=device)
    return philox4x32(element & LOW, element >> 32, row & LOW, tags, *split_key(draw.key))
