"""The plain operation by other means, times a gain that is state: a parameter and a buffer made by `prepare`."""

from __future__ import annotations

from typing import Any, Literal

from pipeline_lib.config.base import Settings as Base
from pipeline_lib.transforms.base import ROLES, Compute, Site, Transform
from pipeline_lib.transforms.patterns import EVERYWHERE, SitePatterns


class Settings(Base):
    """Settings of the toy."""

    type: Literal["toy_compute"] = "toy_compute"
    gain: float = 2.0
    sites: SitePatterns = EVERYWHERE


def make(site: Site, gain: float) -> Compute:
    """The compute of one site."""
    import torch
    from torch import Tensor, nn

    class Gain(nn.Module, Compute):
        """See the module."""

        roles = frozenset(ROLES[site.kind])

        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.full((1,), torch.nan))
            self.register_buffer("peak", torch.full((), torch.nan))

        def prepare(self, operands: Any) -> None:
            from pipeline_lib.transforms.state import assign

            assign(self.gain, torch.full((1,), gain))
            assign(self.peak, operands["weight"].abs().max() if operands else torch.zeros(()))

        def forward(self, *operands: Any) -> Tensor:
            return OPERATIONS[site.kind](*operands) * self.gain

    return Gain()


def _attention(query: Any, key: Any, value: Any, mask: Any, scale: float, dropout: float) -> Any:
    import torch

    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = torch.nn.functional.dropout(scores.softmax(-1), dropout)
    return torch.einsum("bhqk,bhkd->bhqd", weights, value)


def _linear(x: Any, weight: Any, bias: Any) -> Any:
    y = x @ weight.t()
    return y if bias is None else y + bias


OPERATIONS: dict[str, Any] = {
    "linear": _linear,
    "product": lambda left, right: left @ right,
    "embedding": lambda ids, weight: weight[ids],
    "kv": _attention,
}


class Toy(Transform):
    """The transform."""

    def compute(self, site: Site) -> Compute:
        """The operation of the site's kind."""
        assert isinstance(self.settings, Settings)
        return make(site, self.settings.gain)


def build(settings: Settings) -> Transform:
    """The transform of these settings."""
    return Toy(settings)
