"""Tiles of conductances that multiply in memory, between their converters."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline_lib.transforms.analog.devices import Devices, drift_mean, elapsed
from pipeline_lib.transforms.analog.settings import Settings
from pipeline_lib.transforms.base import Fault, Site, Store, Transform


class Tiles(Store):
    """A weight [out, in] in crossbars of N × N pairs of devices, T = ceil(in / N) along the inputs.

    Stored parts, fp32: `plus` and `minus` [out, in], conductances as shares of the largest, of which one is 0; `scale`
    [T, ceil(out / N)], digital: the largest |weight| of a tile, which is held as the largest conductance, times the
    drift compensation. Faults act on the conductances.
    """

    parts = ("plus", "minus", "scale")
    exposed = ("plus", "minus")
    roles = frozenset({"weight"})
    in_memory = True
    straight_through = False  # the gradient goes through the pair

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def encode(self, value: Tensor, role: str) -> dict[str, Tensor]:
        """The targets of a weight's devices, and its scales."""
        value = value.float()
        largest_TC = self._largest(value.detach())
        shares = value / self._spread(largest_TC, value.shape)
        # Halves, so that a weight of 0 has its gradient as well.
        plus, minus = (shares.abs() + shares) / 2, (shares.abs() - shares) / 2
        return {"plus": plus, "minus": minus, "scale": largest_TC * self._compensation(shares.detach().abs())}

    def decode(self, stored: dict[str, Tensor], role: str) -> Tensor:
        """(plus − minus) · scale, [out, in]."""
        difference = stored["plus"] - stored["minus"]
        return difference * self._spread(stored["scale"], difference.shape)

    def multiply(self, stored: dict[str, Tensor], input: Tensor, bias: Tensor | None) -> Tensor:
        """See `Store.multiply`; in fp32, under autocast the result is in its dtype."""
        kind, size = input.device.type, self.settings.tile_size
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
        with torch.autocast(kind, enabled=False):
            weight_OK, x_K = stored["plus"] - stored["minus"], input.float()
            tiles, size = -(-x_K.shape[-1] // size), min(size, x_K.shape[-1])
            short = tiles * size - x_K.shape[-1]
            weight_OTN = F.pad(weight_OK, (0, short)).unflatten(-1, (tiles, size))
            x_TN = F.pad(x_K, (0, short)).unflatten(-1, (tiles, size))
            range_T1 = x_TN.detach().abs().amax(-1, keepdim=True)
            range_T1 = torch.where(range_T1 > 0, range_T1, 1.0)
            sums_TO = torch.einsum(
                "...tn,otn->...to", _convert(x_TN / range_T1, self.settings.dac_bits, 1.0), weight_OTN
            )
            sums_TO = _convert(sums_TO, self.settings.adc_bits, self.settings.adc_range)
            scale_TO = stored["scale"].repeat_interleave(self.settings.tile_size, dim=1)[:, : weight_OK.shape[0]]
            y = (sums_TO * (range_T1 * scale_TO)).sum(-2)
            return (y if bias is None else y + bias.float()).to(dtype)

    def _largest(self, value: Tensor) -> Tensor:
        """[T, C]: the largest |weight| of every tile; 1 where there is no other than 0."""
        size, (rows, features) = self.settings.tile_size, value.shape
        down, across = -(-rows // size), -(-features // size)
        padded = F.pad(value.abs(), (0, across * size - features, 0, down * size - rows))
        largest_TC = padded.view(down, size, across, size).amax((1, 3)).t()
        return torch.where(largest_TC > 0, largest_TC, 1.0)

    def _spread(self, value_TC: Tensor, shape: torch.Size) -> Tensor:
        """A number for each tile as one for each weight [out, in]."""
        size = self.settings.tile_size
        return value_TC.t().repeat_interleave(size, 0)[: shape[0]].repeat_interleave(size, 1)[:, : shape[1]]

    def _compensation(self, target: Tensor) -> Tensor | float:
        """What the layer's conductances are expected to have lost, as a factor that makes up for it."""
        settings = self.settings
        if not settings.drift_compensation or settings.drift == 0 or settings.time == 0:
            return 1.0
        left = (target * elapsed(settings) ** (-settings.drift * drift_mean(target))).sum()
        return torch.where(left > 0, target.sum() / left, 1.0)


class Analog(Transform):
    """Linear layers in analog memory."""

    kinds = frozenset({"linear"})
    settings: Settings

    def store(self, site: Site) -> Store:
        """The tiles of the site's weight."""
        return Tiles(self.settings)

    def fault(self, site: Site) -> Fault:
        """What happens to their devices."""
        return Devices(self.settings)


def _convert(value: Tensor, bits: int | None, limit: float) -> Tensor:
    """The nearest of the 2^bits − 1 values that a converter of ± limit tells; the gradient goes straight through."""
    if bits is None:
        return value
    steps = 2 ** (bits - 1) - 1
    converted = (value.detach() * (steps / limit)).round().clamp(-steps, steps) * (limit / steps)
    return value + (converted - value).detach()
