"""8-bit codes with one scale a row (levels > 0), or the value itself (levels 0)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pipeline_lib.config.base import Settings as Base
from pipeline_lib.transforms.base import ROLES, Site, Store, Transform
from pipeline_lib.transforms.patterns import EVERYWHERE, SitePatterns

if TYPE_CHECKING:
    from torch import Tensor


class Settings(Base):
    """Settings of the toy."""

    type: Literal["toy_store"] = "toy_store"
    levels: int = 127
    sites: SitePatterns = EVERYWHERE


class Codes(Store):
    """See the module."""

    parts = ("codes", "scale")
    exposed = ("codes",)

    def __init__(self, site: Site, levels: int) -> None:
        self.levels, self.roles = levels, frozenset(ROLES[site.kind])

    def encode(self, value: Tensor, role: str) -> dict[str, Tensor]:
        """int8 codes in the value's shape, and the scale of the last dimension."""
        import torch

        scale = value.abs().amax(-1, keepdim=True).clamp(min=1e-6)
        if not self.levels:
            return {"codes": value, "scale": scale}
        return {"codes": (value / scale * self.levels).round().to(torch.int8), "scale": scale}

    def decode(self, stored: dict[str, Tensor], role: str) -> Tensor:
        """codes · scale / levels."""
        return stored["codes"] * stored["scale"] / self.levels if self.levels else stored["codes"]


class Toy(Transform):
    """The transform."""

    def store(self, site: Site) -> Store:
        """`Codes` of every role."""
        assert isinstance(self.settings, Settings)
        return Codes(site, self.settings.levels)


def build(settings: Settings) -> Transform:
    """The transform of these settings."""
    return Toy(settings)
