"""Ternary grids and their packing: weights as codes -1, 0, 1 and scales, the codes five to a byte or four to a byte.

Layout `trits`: 3⁵ = 243 ≤ 256, so a byte holds five base-3 digits (code + 1), the first of five neighbours in the most
significant place: byte = Σ (code_i + 1)·3^(4-i). Layout `two_bit`: the byte holds four fields of two bits (code + 1),
the first neighbour in the lowest bits. What no packing makes and a fault may leave behind (bytes above 242, the field
3) reads as +1, the nearest code.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from pipeline_lib.numerics.look_up import look_up

Layout = Literal["trits", "two_bit"]
Quantiser = Literal["absmean_round", "sign_center"]

Reduce = Callable[[list[float]], list[float]]
"""Adds numbers up over processes."""

PER_BYTE: dict[str, int] = {"trits": 5, "two_bit": 4}
_BASE: dict[str, int] = {"trits": 3, "two_bit": 4}


def packed_width(features: int, layout: Layout = "trits") -> int:
    """Bytes that a row of `features` codes takes."""
    return -(-features // PER_BYTE[layout])


def pack_codes(codes: Tensor, layout: Layout = "trits") -> Tensor:
    """uint8 [..., packed_width(n)] from codes [..., n] in -1, 0, 1 (any dtype); the last byte is filled up with 0."""
    count = PER_BYTE[layout]
    digits = pad(codes, (0, -codes.shape[-1] % count)).to(torch.int16) + 1
    digits = digits.unflatten(-1, (-1, count))
    return (digits * _places(layout, codes.device)).sum(-1, dtype=torch.int16).to(torch.uint8)


def unpack_codes(packed: Tensor, features: int, layout: Layout = "trits") -> Tensor:
    """int8 [..., features], what `pack_codes` was given."""
    table = code_table(layout, torch.int8, packed.device)
    return look_up(table, packed.flatten(end_dim=-2), features).view(*packed.shape[:-1], features)


@lru_cache(maxsize=32)
def code_table(layout: Layout, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[256, codes a byte]: the codes that each byte holds."""
    highest = 2 * sum(_BASE[layout] ** i for i in range(PER_BYTE[layout]))  # every digit 2: all +1
    bytes_ = torch.arange(256, device=device)
    if layout == "trits":
        bytes_ = bytes_.clamp(max=highest)
    digits = bytes_[:, None] // _places(layout, device) % _BASE[layout]
    return (digits.clamp(max=2) - 1).to(dtype)


def _places(layout: Layout, device: torch.device) -> Tensor:
    """int16 [codes a byte]: what the digit of each neighbour counts."""
    powers = [_BASE[layout] ** i for i in range(PER_BYTE[layout])]
    return torch.tensor(powers[::-1] if layout == "trits" else powers, dtype=torch.int16, device=device)


# -- the grid ----------------------------------------------------------------------------------------------------------


def group_width(features: int, group_size: int | None) -> int:
    """Features that share a scale; None: all of a row."""
    return features if group_size is None else min(group_size, features)


def group_sums(value: Tensor, group_size: int | None) -> tuple[Tensor, Tensor]:
    """(sums, counts) over each row's groups of neighbours, fp32 [rows, groups]; the last group may be narrower."""
    rows, features = value.shape
    width = group_width(features, group_size)
    grouped = pad(value.float(), (0, -features % width)).view(rows, -(-features // width), width)
    starts = torch.arange(0, features, width, device=value.device)
    return grouped.sum(-1), (features - starts).clamp(max=width).float().expand(rows, -1)


def spread(per_group: Tensor, features: int, group_size: int | None) -> Tensor:
    """[rows or 1, groups] → [rows or 1, features or 1], to be broadcast over the weight."""
    if per_group.shape[-1] == 1:
        return per_group
    return per_group.repeat_interleave(group_width(features, group_size), dim=-1)[:, :features]


def quantise(
    value: Tensor,
    quantiser: Quantiser = "absmean_round",
    per_tensor: bool = True,
    group_size: int | None = None,
    reduce: Reduce | None = None,
) -> tuple[Tensor, Tensor]:
    """(codes int8 [out, in], scale fp32) of a weight, to be read as codes · scale.

    `absmean_round`: scale s = mean |w|, code = clip(round(w / s), -1, 1), half to even (Ma et al., 2024, arXiv
    2402.17764, equations 1-3). `sign_center`: the same s, code = sign(w - mean w), two values in practice (Wang et al.,
    2023, arXiv 2310.11453, equations 1-3, with 0 where w is the mean itself). Where all are zero, so are the codes.

    Args:
        value: [out, in], any float; or the rows of it that this process has, with `reduce`.
        per_tensor: one scale for all; else one for each row and group.
        group_size: neighbours in a row that share a scale; None: the row.
        reduce: makes the scale that of the rows of all processes; None: of these.

    Returns:
        scale: [1, 1] per tensor, else [out, groups].
    """
    value = value.detach().float()
    features = value.shape[1]
    scale = _mean(value.abs(), per_tensor, group_size, reduce)
    at = spread(scale, features, group_size)
    if quantiser == "sign_center":
        centre = spread(_mean(value, per_tensor, group_size, reduce), features, group_size)
        codes = torch.sign(value - centre) * (at > 0)
    else:
        codes = (value / at.clamp(min=torch.finfo(torch.float32).tiny)).round().clamp(-1, 1)
    return codes.to(torch.int8), scale


def _mean(value: Tensor, per_tensor: bool, group_size: int | None, reduce: Reduce | None) -> Tensor:
    if not per_tensor:
        sums, counts = group_sums(value, group_size)
        return sums / counts
    total = value.sum(dtype=torch.float64)
    if reduce is None:
        return (total / value.numel()).float().view(1, 1)
    total, count = reduce([float(total), float(value.numel())])
    return torch.tensor([[total / count]], dtype=torch.float32, device=value.device)
