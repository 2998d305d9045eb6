"""Ternary weights as a store: codes and scales, computed at each forward pass or held packed."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline_lib.numerics.ternary_linear import dequantise, ternary_linear
from pipeline_lib.numerics.trits import PER_BYTE, group_width, pack_codes, quantise
from pipeline_lib.transforms.base import Rows, Site, Store, Transform
from pipeline_lib.transforms.packed import PackedStore
from pipeline_lib.transforms.ternary.settings import Settings


class TernaryStore(PackedStore):
    """The weight of one layer.

    Stored parts: `codes`, uint8 [out, bytes]; `scale` [1, 1] or [out, groups], in the dtype of the weight. Faults act
    on the codes; the few scales are taken to be kept safe.
    """

    parts = ("codes", "scale")
    exposed = ("codes",)

    def __init__(self, settings: Settings, shape: tuple[int, ...]) -> None:
        super().__init__(shape)
        self.settings, self.features = settings, shape[1]

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
        weight = dequantise(stored["codes"], stored["scale"], self.features, settings.layout, settings.group_size)
        return weight if self.packed(role) is None else weight.to(self.dtype)

    @torch.no_grad()
    def pack(self, value: Tensor, role: str, rows: Rows | None = None) -> None:
        """Hold the codes of `value` from now on; with `rows`, those of all processes on each."""
        stored = self._encode(value, rows)
        if rows is not None:
            stored["codes"] = rows.gather(stored["codes"])
            if self.settings.granularity != "tensor":
                stored["scale"] = rows.gather(stored["scale"])
        held = self.packed(role)
        device = value.device if held is None else held["codes"].device
        self.hold({part: tensor.to(device) for part, tensor in stored.items()}, value.dtype)

    def multiply(self, stored: dict[str, Tensor], input: Tensor, bias: Tensor | None) -> Tensor:
        """See `Store.multiply`; unpacked tile by tile, under autocast in its dtype."""
        kind = input.device.type
        if torch.is_autocast_enabled(kind):
            input = input.to(torch.get_autocast_dtype(kind))
        settings = self.settings
        codes, scale = stored["codes"], stored["scale"]
        y = ternary_linear(input, codes, scale, self.features, settings.layout, settings.group_size)
        return y if bias is None else y + bias.to(y.dtype)

    def bits_per_weight(self) -> float:
        """See `PackedStore.bits_per_weight`; scales are fp32, as the weights that they come from."""
        settings, (rows, features) = self.settings, self.shape
        shares = {"tensor": rows * features, "row": features, "group": group_width(features, settings.group_size)}
        return 8 / PER_BYTE[settings.layout] + 32 / shares[settings.granularity]


class Ternary(Transform):
    """Three-valued weights."""

    kinds = frozenset({"linear"})
    settings: Settings

    def store(self, site: Site) -> Store:
        """The codes of the site's weight."""
        return TernaryStore(self.settings, site.shape)
