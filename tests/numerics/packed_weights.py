"""Packed weights for tests."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline_lib.numerics.grids import group_count
from pipeline_lib.numerics.packing import pack

TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Of a product, as a share of its largest element."""


def packed_weight(out: int, features: int, group: int, bits: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Random codes, scales and zero points as they are stored."""
    generator = torch.Generator().manual_seed(seed)
    groups = group_count(features, group)
    codes = torch.randint(0, 2**bits, (out, features), generator=generator)
    zero = torch.randint(0, 2**bits, (out, groups), generator=generator)
    scale = (torch.rand(out, groups, generator=generator) + 0.5).half() / 2**bits
    return pack(codes, bits), scale, pack(zero, bits)
