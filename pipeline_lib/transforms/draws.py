"""Random numbers for faults, from a `Draw` alone: element by element, whatever else is in the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline_lib.numerics.philox import LOW, philox4x32, split_key
from pipeline_lib.transforms.base import Draw

_TAG = 0x756E6966  # "unif": counter word 3, apart from every tag of the bit-flip streams
_RESULT_TAG = 0x72736C74  # "rslt"


def uniform(draw: Draw, shape: torch.Size) -> Tensor:
    """Independent uniform numbers in [0, 1), multiples of 2⁻²⁴, float32 in `shape` = [rows, elements…].

    Word 0 of Philox4x32-10 under the draw's key at counter (element low, element high, row, tag), or, where the draw
    is of a compute, (feature, vector, row, tag of results). A reference: some 60 integer operations an element.
    """
    device = draw.key.device
    if draw.strides is not None:
        row, vector = vectors(draw, shape)
        feature = torch.arange(shape[-1], device=device)
        tag = torch.full((), _RESULT_TAG, dtype=torch.int64, device=device)
        word, *_ = philox4x32(feature, vector[..., None], row[..., None], tag, *split_key(draw.key))
        return (word >> 8).float() * 2.0**-24
    rows, elements = shape[0], shape[1:].numel()
    row = draw.first_row + torch.arange(rows, device=device)[:, None]
    element = draw.first_element + torch.arange(elements, device=device)[None]
    tag = torch.full((), _TAG, dtype=torch.int64, device=device)
    word, *_ = philox4x32(element & LOW, element >> 32, row & LOW, tag, *split_key(draw.key))
    return ((word >> 8).float() * 2.0**-24).view(shape)


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
