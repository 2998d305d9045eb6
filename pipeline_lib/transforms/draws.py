"""Random numbers for faults, from a `Draw` alone: element by element, whatever else is in the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline_lib.numerics.philox import LOW, philox4x32, split_key
from pipeline_lib.transforms.base import Draw

_TAG = 0x756E6966  # "unif": counter word 3, apart from every tag of the bit-flip streams


def uniform(draw: Draw, shape: torch.Size) -> Tensor:
    """Independent uniform numbers in [0, 1), multiples of 2⁻²⁴, float32 in `shape` = [rows, elements…].

    Word 0 of Philox4x32-10 at counter (element low, element high, row, tag) under the draw's key. A reference: some
    60 integer operations an element.
    """
    device = draw.key.device
    rows, elements = shape[0], shape[1:].numel()
    row = draw.first_row + torch.arange(rows, device=device)[:, None]
    element = draw.first_element + torch.arange(elements, device=device)[None]
    tag = torch.full((), _TAG, dtype=torch.int64, device=device)
    word, *_ = philox4x32(element & LOW, element >> 32, row & LOW, tag, *split_key(draw.key))
    return ((word >> 8).float() * 2.0**-24).view(shape)
