"""Random numbers for faults, from a `Draw` alone: element by element, whatever else is in the batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pipeline_lib.numerics.philox import LOW, philox4x32, split_key
from pipeline_lib.transforms.base import Draw

_UNIFORM, _NORMAL = 0x756E6966, 0x6E6F726D  # "unif", "norm": counter word 3, apart from every tag of the bit flips
_RESULT_TAG = 0x72736C74  # "rslt"


def uniform(draw: Draw, shape: torch.Size) -> Tensor:
    """Independent uniform numbers in [0, 1), multiples of 2⁻²⁴, float32 in `shape` = [rows, elements…].

    Word 0 of Philox4x32-10 under the draw's key at counter (element low, element high, row, tag), or, where the draw
    is of a compute, (feature, vector, row, tag of results). A reference: some 60 integer operations an element.
    """
    if draw.strides is not None:
        row, vector = vectors(draw, shape)
        feature = torch.arange(shape[-1], device=draw.key.device)
        tag = torch.full((), _RESULT_TAG, dtype=torch.int64, device=draw.key.device)
        word, *_ = philox4x32(feature, vector[..., None], row[..., None], tag, *split_key(draw.key))
        return (word >> 8).float() * 2.0**-24
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


def vectors(draw: Draw, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Row and vector, in [0, 2³²), of every vector of the result [rows, …, features] of a compute.

    Returns:
        int64, the row in [rows, 1, …] and the vector in [1, …], which broadcast to shape[:-1].
    """
    assert draw.strides is not None
    device, middle = draw.key.device, shape[1:-1]
    row = draw.first_row + torch.arange(shape[0], device=device)
    vector = draw.first_element
    for index, (size, stride) in enumerate(zip(middle, draw.strides, strict=True)):
        vector = vector + (torch.arange(size, device=device) * stride).view(-1, *[1] * (len(middle) - index - 1))
    return (row & LOW).view(-1, *[1] * len(middle)), (vector & LOW).unsqueeze(0)
