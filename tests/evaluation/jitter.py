"""A small transform for tests: every operand of a linear is scaled by pseudo-random factors drawn from its stream."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from pipeline_lib.config.base import Settings as Base
from pipeline_lib.transforms.base import Draw, Fault, Site, Transform

if TYPE_CHECKING:
    from torch import Tensor

ROWS_SEEN: list[tuple[str, str, int, int]] = []  # (site, role, first row, rows), in the order of drawing


class Settings(Base):
    type: Literal["jitter"] = "jitter"
    amount: float = Field(0.1, ge=0)
    roles: tuple[str, ...] = ("input",)


class Jitter(Fault):
    def __init__(self, site: Site, settings: Settings) -> None:
        self.site, self.amount, self.roles = site, settings.amount, frozenset(settings.roles)

    def __call__(self, tensor: Tensor, role: str, draw: Draw) -> Tensor:
        import torch

        ROWS_SEEN.append((self.site.name, role, int(draw.first_row), len(tensor)))
        width = tensor[0].numel()
        row = draw.first_row + torch.arange(len(tensor), device=tensor.device)[:, None]
        element = draw.first_element + torch.arange(width, device=tensor.device)[None, :]
        mixed = (row * 1_000_003 + element) * 2_654_435_761 + draw.key
        mixed = (mixed ^ (mixed >> 29)) * 1_181_783_497
        factor = 1 + self.amount * (((mixed >> 17) % 2001).double() / 1000 - 1)
        return tensor * factor.reshape(tensor.shape).to(tensor.dtype)


class JitterTransform(Transform):
    kinds = frozenset({"linear"})

    def fault(self, site: Site) -> Fault | None:
        assert isinstance(self.settings, Settings)
        return Jitter(site, self.settings)


def build(settings: Any) -> Transform:
    return JitterTransform(settings)
