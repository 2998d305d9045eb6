"""The compute of a site: running ranges, and the product within them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline_lib.config.errors import UserError
from pipeline_lib.transforms.base import Compute, Draw, Site, Transform
from pipeline_lib.transforms.optical.product import How, product
from pipeline_lib.transforms.optical.settings import Settings

PROBABILITIES = ".attention_value"
"""Ends the name of the site whose left operand is attention probabilities: their range is 0 to 1 by definition, and 0,
what is masked, must stay 0."""


class OpticalProduct(nn.Module, Compute):
    """The product of one linear layer or of one product of attention.

    Attributes:
        ranges: [3, 2] fp32, least and largest value of left (or input), right (or weight) and result; (inf, −inf) until
            they are known. A pass uses those that the steps before it left, so that no token meets the range of a later
            one, and nothing depends on how a batch is cut.
        seen: [3, 2] fp32, (−least, largest) over the passes since `settle`: a maximum, which a recomputed pass does
            not change. No buffer: data parallelism would overwrite it with that of the first rank.
    """

    observes = True
    ranges: Tensor

    def __init__(self, settings: Settings, site: Site) -> None:
        super().__init__()
        self.settings, self.site = settings, site.name
        self.random = settings.dither or settings.ramp is not None  # the draw tells the step as well
        self._linear, self._probabilities = site.kind == "linear", site.name.endswith(PROBABILITIES)
        self.register_buffer("ranges", torch.empty(3, 2))
        self.seen = torch.full((3, 2), -math.inf)
        self._known = False
        self._knobs = _knobs(settings)
        self.prepare({})

    def prepare(self, operands: Mapping[str, Tensor]) -> None:
        """See `Function.prepare`."""
        self.ranges.copy_(torch.tensor([math.inf, -math.inf]))
        if self._probabilities:
            self.ranges[0] = torch.tensor([0.0, 1.0])
        self.seen.fill_(-math.inf)
        self._knobs.copy_(_knobs(self.settings))
        self._known = False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        made = super()._apply(fn, recurse)
        self.seen, self._knobs = fn(self.seen), fn(self._knobs)
        return made

    def forward(self, left: Tensor, right: Tensor, bias: Tensor | None = None, *, draw: Draw | None = None) -> Tensor:
        """See `Compute`. The bias is added in exact arithmetic."""
        kind = left.device.type
        lower = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        if lower:
            left, right = (t.to(torch.get_autocast_dtype(kind)) for t in (left, right))
        observe = self.training or self.observing
        if not observe and not self._known:
            self._check()
        settings = self.settings
        eased = self.training and settings.ramp is not None and settings.ramp.of == "noise"
        how = How(self._linear, settings.lut_min, settings.gate, settings.quantiles, observe, self.observing, eased)
        with torch.autocast(kind, enabled=False) if lower else nullcontext():
            y, reach = product(left, right, self.ranges, self._strength(draw), draw if settings.dither else None, how)
        if observe:
            first = 1 if self._probabilities else 0  # their range is known
            with torch.no_grad():
                torch.maximum(self.seen[first:], reach[first:], out=self.seen[first:])
        return y if bias is None else y + bias.to(y.dtype)

    def _strength(self, draw: Draw | None) -> Tensor:
        """The knobs of `grids`: eased in over a training, at full strength in evaluation."""
        ramp = self.settings.ramp
        if ramp is None or not self.training:
            return self._knobs
        assert draw is not None and draw.step is not None  # noqa: PT018 - a ramp asks for the draw
        left = 1 - (draw.step.float() / ramp.steps).clamp(max=1.0)  # share of the ramp that is still to come
        if ramp.of == "noise":
            return torch.cat([self._knobs[:2], left[None]])
        levels = self._knobs[:2] + 1
        eased = (levels.log2() * (1 - left) + math.log2(ramp.from_levels) * left).exp2().round()
        return torch.cat([torch.where(left > 0, eased, levels) - 1, self._knobs[2:]])

    def _check(self) -> None:
        """Make sure, once, that the ranges are known.

        Raises:
            UserError: they are not.
        """
        if torch.compiler.is_compiling():
            return
        if not bool((self.ranges[:, 0] <= self.ranges[:, 1]).all()):
            raise UserError(
                "the ranges of transform optical are not known: the model was neither trained nor calibrated under it",
                where=self.site,
                fix="give the experiment a `dataset` to be calibrated on (stage clip), or train it under `optical`; in "
                "Python call pipeline_lib.transforms.observe.watch(applied, model, batches) first",
            )
        self._known = True


def followed(ranges: Tensor, seen: Tensor, smoothing: float) -> Tensor:
    """Ranges [..., 2] after a step in which `seen`, (−least, largest) [..., 2], was observed.

    Those stay of which nothing, or anything that is not finite, was seen.
    """
    low, high = -seen[..., :1], seen[..., 1:]
    new = torch.cat([low, high], -1)
    known = ranges[..., :1] <= ranges[..., 1:]
    smooth = ranges * smoothing + new * (1 - smoothing)
    usable = torch.isfinite(low) & torch.isfinite(high)
    return torch.where(usable, torch.where(known, smooth, new), ranges)


class Optical(Transform):
    """Quantised and dithered products."""

    kinds = frozenset({"linear", "product"})
    settings: Settings

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._made: list[OpticalProduct] = []

    def compute(self, site: Site) -> Compute:
        """The product of the site."""
        made = OpticalProduct(self.settings, site)
        self._made.append(made)
        return made

    @torch.no_grad()
    def settle(self) -> None:
        """Move the ranges towards what all ranks saw; on a GPU without waiting for it."""
        if not self._made:
            return
        seen = torch.stack([function.seen for function in self._made])
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(seen, op=dist.ReduceOp.MAX)
        ranges = torch.stack([function.ranges for function in self._made])
        for function, own in zip(self._made, followed(ranges, seen, self.settings.smoothing), strict=True):
            function.ranges.copy_(own)
            function.seen.fill_(-math.inf)


def _knobs(settings: Settings) -> Tensor:
    """Steps of operands and result, and no slack."""
    output = settings.output_levels or settings.levels
    return torch.tensor([settings.levels - 1.0, output - 1.0, 0.0])
