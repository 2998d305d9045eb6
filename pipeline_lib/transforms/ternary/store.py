"""Ternary weights as a store: codes and scales, computed at each forward pass or held packed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline_lib.numerics.ternary_linear import dequantise, ternary_linear
from pipeline_lib.numerics.trits import pack_codes, quantise
from pipeline_lib.transforms.base import Rows, Site, Store, Transform
from pipeline_lib.transforms.ternary.settings import Settings


class TernaryStore(nn.Module, Store):
    """The weight of one layer.

    Stored parts: `codes`, uint8 [out, bytes]; `scale` [1, 1] or [out, groups], in the dtype of the weight. Faults act
    on the codes; the few scales are taken to be kept safe.
    """

    parts = ("codes", "scale")
    exposed = ("codes",)
    roles = frozenset({"weight"})

    codes: Tensor | None
    scale: Tensor | None

    def __init__(self, settings: Settings, features: int) -> None:
        super().__init__()
        self.settings, self.features = settings, features
        self.register_buffer("codes", None, persistent=False)
        self.register_buffer("scale", None, persistent=False)

    def encode(self, value: Tensor, role: str) -> dict[str, Tensor]:
        """Codes and scales of a weight [out, in]."""
        return self._encode(value, None)

    def _encode(self, value: Tensor, rows: Rows | None) -> dict[str, Tensor]:
        settings = self.settings
        codes, scale = quantise(
            value,
            settings.quantiser,
            settings.granularity == "tensor",
            settings.group_size,
            rows.add if rows else None,
        )
        return {"codes": pack_codes(codes, settings.layout), "scale": scale.to(value.dtype)}

    def decode(self, stored: dict[str, Tensor], role: str) -> Tensor:
        """codes · scale, [out, in]."""
        settings = self.settings
        return dequantise(stored["codes"], stored["scale"], self.features, settings.layout, settings.group_size)

    def packed(self, role: str) -> dict[str, Tensor] | None:
        """Codes and scales as they are held, if they are."""
        if self.codes is None or self.scale is None:
            return None
        return {"codes": self.codes, "scale": self.scale}

    @torch.no_grad()
    def pack(self, value: Tensor, role: str, rows: Rows | None = None) -> None:
        """Hold the codes of `value` from now on; with `rows`, those of all processes on each."""
        stored = self._encode(value, rows)
        if rows is not None:
            stored["codes"] = rows.gather(stored["codes"])
            if self.settings.granularity != "tensor":
                stored["scale"] = rows.gather(stored["scale"])
        device = value.device if self.codes is None else self.codes.device
        self.codes, self.scale = stored["codes"].to(device), stored["scale"].to(device)

    def multiply(self, stored: dict[str, Tensor], input: Tensor, bias: Tensor | None) -> Tensor:
        """See `Store.multiply`; unpacked tile by tile, under autocast in its dtype."""
        kind = input.device.type
        if torch.is_autocast_enabled(kind):
            input = input.to(torch.get_autocast_dtype(kind))
        settings = self.settings
        codes, scale = stored["codes"], stored["scale"]
        y = ternary_linear(input, codes, scale, self.features, settings.layout, settings.group_size)
        return y if bias is None else y + bias.to(y.dtype)


class Ternary(Transform):
    """Three-valued weights."""

    kinds = frozenset({"linear"})
    settings: Settings

    def store(self, site: Site) -> Store:
        """The codes of the site's weight."""
        return TernaryStore(self.settings, site.shape[1])
