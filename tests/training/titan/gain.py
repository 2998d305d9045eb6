"""A transform with state: linear layers times a trained gain, with the largest initial weight noted in a buffer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from pipeline_lib.config.base import Settings as Base
from pipeline_lib.transforms.base import Compute, Site, Transform
from pipeline_lib.transforms.patterns import SitePatterns
from pipeline_lib.transforms.state import assign

MLP = {"model.layers.*.mlp.*": {}}


class Settings(Base):
    """Where."""

    type: Literal["gain"] = "gain"
    sites: SitePatterns = MLP  # type: ignore[assignment]


def build(settings: Settings) -> Transform:
    """The transform."""

    class Gains(Transform):
        kinds = frozenset({"linear"})

        def compute(self, site: Site) -> Compute:
            return Gain()

    return Gains(settings)


class Gain(nn.Module, Compute):
    """y = gain · (x Wᵀ)."""

    roles = frozenset({"weight", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((1,), torch.nan))
        self.register_buffer("peak", torch.full((), torch.nan))

    def prepare(self, operands: Mapping[str, Tensor]) -> None:
        assign(self.gain, torch.full((1,), 1.5))
        assign(self.peak, operands["weight"].abs().max())

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return nn.functional.linear(x, weight, bias) * self.gain
