"""Quantisation grids: the values that a weight can take within its group, and the codes that stand for them.

A grid knows groups only as the last dimension of its operands; `to_groups` makes them from rows. All arithmetic is in
fp32 and rounds half to even, in training, packing and evaluation alike.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

SMALLEST_RANGE = 1e-5

# The eight levels of asymmetric 3-bit NormalFloat and the midpoints between them (BitDistiller, Du et al. 2024,
# arXiv:2402.10631, section 3.1; NormalFloat: QLoRA, Dettmers et al. 2023): three below zero in units of the group's
# |min|, zero, and four above in units of its |max|.
_N2F3_LEVELS = (
    -1.0, -0.5350227355957031, -0.2469314038753510, 0.0,
    0.1833375245332718, 0.3819939494132996, 0.6229856610298157, 1.0,
)  # fmt: skip
_N2F3_ZERO = 3


def group_count(features: int, group_size: int) -> int:
    """Groups of a row; a last group that is not full counts. -1 is one group a row."""
    return 1 if group_size == -1 else -(-features // group_size)


def to_groups(rows: Tensor, group_size: int) -> Tensor:
    """[..., features] -> [..., groups, group_size]; a last group that is not full repeats its last element."""
    features = rows.shape[-1]
    size = features if group_size == -1 else group_size
    missing = group_count(features, group_size) * size - features
    if missing:
        rows = torch.cat([rows, rows[..., -1:].expand(*rows.shape[:-1], missing)], dim=-1)
    return rows.unflatten(-1, (-1, size))


def from_groups(grouped: Tensor, features: int) -> Tensor:
    """The inverse of `to_groups`."""
    return grouped.flatten(-2)[..., :features]


class Grid(ABC):
    """A quantiser of groups.

    Attributes:
        bits: of a code.
        scales: names of its fp parameters, one value a group.
        zeros: names of its integer parameters of `bits` bits, one value a group.
    """

    bits: int
    scales: tuple[str, ...]
    zeros: tuple[str, ...] = ()

    @abstractmethod
    def parameters(self, minimum: Tensor, maximum: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """The parameters of groups with these ranges; fp32, differentiable in the ranges where there is a scale.

        Args:
            minimum, maximum: [..., groups].
            dtype: that scales are stored in; their values here are rounded to it already.
        """

    @abstractmethod
    def codes(self, groups: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """uint8 codes of fp32 [..., groups, group_size] under parameters [..., groups]; the nearest values."""

    @abstractmethod
    def values(self, codes: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """The fp32 values of any codes, in their shape."""

    @abstractmethod
    def through(self, groups: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """Zero, in the shape of `groups`, with the straight-through estimator's gradient of its rounding.

        Added to `values`, whose own gradient reaches the scales.
        """

    def bits_per_weight(self, group_size: int, dtype: torch.dtype) -> float:
        """Of a packed weight in groups of this size: the code and its share of the group's parameters."""
        share = len(self.scales) * 8 * dtype.itemsize + len(self.zeros) * self.bits
        return self.bits + share / group_size


@dataclass(frozen=True)
class IntGrid(Grid):
    """Asymmetric integers with a zero point: w' = (q - z) s.

    s = max(max - min, 1e-5) / (2^b - 1), z = clamp(-round(min / s), 0, 2^b - 1),
    q = clamp(round(w / s) + z, 0, 2^b - 1) (BitDistiller, Du et al. 2024, arXiv:2402.10631, section 3.1). Zero is
    always a value of the grid; a group that does not straddle zero is clamped to the side of zero it lies on.
    """

    bits: int
    scales = ("scale",)
    zeros = ("zero",)

    def parameters(self, minimum: Tensor, maximum: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        steps = 2**self.bits - 1
        scale = _stored((maximum - minimum).clamp_min(SMALLEST_RANGE) / steps, dtype)
        zero = (-(minimum.detach() / scale.detach()).round()).clamp(0, steps)
        return {"scale": scale, "zero": zero}

    def codes(self, groups: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        shifted = (groups / parameters["scale"][..., None]).round_().add_(parameters["zero"][..., None])
        return shifted.clamp_(0, 2**self.bits - 1).to(torch.uint8)

    def values(self, codes: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        return (codes.float() - parameters["zero"][..., None]) * parameters["scale"][..., None]

    def through(self, groups: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        scale = parameters["scale"][..., None]
        units = groups / scale
        with torch.no_grad():
            shifted = units.round().add_(parameters["zero"][..., None])
            inside = (shifted >= 0) & (shifted <= 2**self.bits - 1)
        return (units - units.detach()) * scale.detach() * inside


@dataclass(frozen=True)
class NormalFloat3(Grid):
    """Asymmetric 3-bit NormalFloat, N2F3: levels above zero scale with |max|, those below with |min|.

    A value on the midpoint of two levels takes the larger. A side without a range holds zero only.
    """

    bits = 3
    scales = ("positive", "negative")

    def parameters(self, minimum: Tensor, maximum: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        return {"positive": _stored(maximum.abs(), dtype), "negative": _stored(minimum.abs(), dtype)}

    def codes(self, groups: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        levels = torch.tensor(_N2F3_LEVELS, dtype=torch.float64)
        bounds = ((levels[1:] + levels[:-1]) / 2).float().to(groups.device)
        units = groups / self._side(groups >= 0, parameters).clamp_min(torch.finfo(torch.float32).tiny)
        found = torch.bucketize(units.contiguous(), bounds, right=True)
        # Zero lies between the sides: a quotient of one side never reaches the levels of the other.
        return found.to(torch.uint8)

    def values(self, codes: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        levels = torch.tensor(_N2F3_LEVELS, dtype=torch.float32, device=codes.device)
        return levels[codes.int()] * self._side(codes >= _N2F3_ZERO, parameters)

    def through(self, groups: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        scale = self._side(groups.detach() >= 0, parameters)
        scale = torch.where(scale == 0, 1.0, scale)
        units = groups / scale
        return (units - units.detach()) * scale.detach()

    def _side(self, positive: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        return torch.where(positive, parameters["positive"][..., None], parameters["negative"][..., None])


GRIDS: dict[str, Grid] = {
    "int2-asym": IntGrid(2),
    "int3-asym": IntGrid(3),
    "int4-asym": IntGrid(4),
    "int8-asym": IntGrid(8),
    "n2f3": NormalFloat3(),
}
"""Named formats of weights."""


def _stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`scale` rounded to a dtype, in fp32; the gradient passes."""
    # The difference of two such near numbers is exact, and so is its sum with one of them.
    return scale + (scale.detach().to(dtype).float() - scale.detach())
