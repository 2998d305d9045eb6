"""The store of `int2`: latent or packed weights on a grid."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from pipeline_lib.config.errors import UserError
from pipeline_lib.numerics.grids import GRIDS, from_groups, group_count, to_groups
from pipeline_lib.numerics.packed_linear import packed_linear
from pipeline_lib.numerics.packing import pack, unpack
from pipeline_lib.transforms.base import Site, Store, Transform
from pipeline_lib.transforms.int2.clip import search
from pipeline_lib.transforms.int2.settings import Settings
from pipeline_lib.transforms.packed import PackedStore

_LATENT = "latent"  # travels beside the stored tensors in training, for the gradient only


class GroupedStore(PackedStore):
    """Weights in groups along their input features.

    Stored are, with G = ceil(in / group size): `codes` uint8 [out, ceil(in · bits / 8)], packed least significant bits
    first; scales [out, G]; and zero points packed like codes. Faults act on the codes.

    With clipping there is state: the ranges `minimum` and `maximum`, fp32 [out, G], infinite until they are loaded.
    """

    minimum: Tensor | None
    maximum: Tensor | None
    exposed = ("codes",)
    straight_through = False  # the gradient is led by `decode`: the scale depends on the weight, too

    def __init__(self, settings: Settings, site: Site) -> None:
        super().__init__(site.shape)
        self.settings, self.grid = settings, GRIDS[settings.format]
        self.scale_dtype: torch.dtype = getattr(torch, settings.scale_dtype)
        self.parts = ("codes", *self.grid.scales, *self.grid.zeros)
        self.groups = group_count(site.shape[1], settings.group_size)
        self.has_ranges = settings.clip is not None
        self.calibrated = self.has_ranges and not _skipped(settings, site)
        for name, bound in (("minimum", -math.inf), ("maximum", math.inf)):
            value = torch.full((site.shape[0], self.groups), bound) if self.has_ranges else None
            self.register_buffer(name, value)

    def prepare(self, operands: Mapping[str, Tensor]) -> None:
        """See `Function.prepare`."""
        self._reset()

    def _reset(self) -> None:
        if self.minimum is not None and self.maximum is not None:
            self.minimum.fill_(-math.inf)
            self.maximum.fill_(math.inf)

    def drop_state(self) -> None:
        """Forget the ranges: packed tensors have no use for them."""
        self.minimum = self.maximum = None

    def _groups(self, value: Tensor) -> Tensor:
        """fp32 [out, groups, group size], clipped."""
        grouped = to_groups(value.float(), self.settings.group_size)
        if self.minimum is None or self.maximum is None:
            return grouped
        return grouped.clamp(self.minimum[..., None], self.maximum[..., None])

    def encode(self, value: Tensor, role: str) -> dict[str, Tensor]:
        """See `Store.encode`."""
        grouped = self._groups(value)
        parameters = self.grid.parameters(grouped.amin(-1), grouped.amax(-1), self.scale_dtype)
        with torch.no_grad():
            codes = from_groups(self.grid.codes(grouped, parameters), value.shape[1])
            stored = {"codes": pack(codes, self.grid.bits)}
            stored |= {name: pack(parameters[name], self.grid.bits) for name in self.grid.zeros}
        if torch.is_grad_enabled() and value.requires_grad:
            return {**stored, **{name: parameters[name] for name in self.grid.scales}, _LATENT: value}
        self.dtype = value.dtype
        return {**stored, **{name: parameters[name].to(self.scale_dtype) for name in self.grid.scales}}

    def decode(self, stored: dict[str, Tensor], role: str) -> Tensor:
        """See `Store.decode`; of any rows of the stored tensors."""
        features = self.shape[1]
        parameters = {name: stored[name].float() for name in self.grid.scales}
        parameters |= {name: unpack(stored[name], self.grid.bits, self.groups).float() for name in self.grid.zeros}
        codes = to_groups(unpack(stored["codes"], self.grid.bits, features), self.settings.group_size)
        values = self.grid.values(codes, parameters)
        latent = stored.get(_LATENT)
        if latent is None:
            return from_groups(values, features).to(self.dtype)
        values = values + self.grid.through(self._groups(latent), parameters)
        return from_groups(values, features).to(latent.dtype)

    def multiply(self, stored: dict[str, Tensor], input: Tensor, bias: Tensor | None) -> Tensor:
        """See `Store.multiply`; 2, 4 and 8 bits have kernels, which know no gradient."""
        wants_gradient = torch.is_grad_enabled() and input.requires_grad
        if wants_gradient or not self.grid.zeros or self.grid.bits not in (2, 4, 8):
            return Store.multiply(self, stored, input, bias)
        group_size = self.shape[1] if self.settings.group_size == -1 else self.settings.group_size
        codes, scale, zero = (stored[part] for part in ("codes", "scale", "zero"))
        return packed_linear(input, codes, scale, zero, bias, self.grid.bits, group_size)

    def absorb(self, weight: Tensor) -> Tensor:
        """A training starts from clipped weights; from then on the range is that of the weights (BitDistiller)."""
        clipped = from_groups(self._groups(weight), weight.shape[1]).to(weight.dtype)
        self._reset()
        return clipped

    def calibrate(self, weight: Tensor, inputs: Tensor) -> tuple[dict[str, Tensor], dict[str, float]]:
        """The best range of every group; see `clip.search`."""
        assert self.settings.clip is not None
        return search(weight, inputs, self.settings, self.settings.clip)

    def bits_per_weight(self) -> float:
        """See `PackedStore.bits_per_weight`."""
        size = self.shape[1] if self.settings.group_size == -1 else self.settings.group_size
        return self.grid.bits_per_weight(size, self.scale_dtype)


def _skipped(settings: Settings, site: Site) -> bool:
    return settings.clip is not None and any(fnmatchcase(site.name, pattern) for pattern in settings.clip.skip)


class Int2(Transform):
    """Weights on a grid of a few bits."""

    kinds = frozenset({"linear"})
    settings: Settings

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        if any(pattern.startswith("embedding:") for pattern, _ in settings.sites):
            self.kinds = frozenset({"linear", "embedding"})  # type: ignore[misc]  # patterns see no others

    def store(self, site: Site) -> Store:
        """The weight's store."""
        return GroupedStore(self.settings, site)

    def prepare(self, model: torch.nn.Module) -> None:
        """Refuse a tied output layer that would be stored in another way than the embedding.

        Raises:
            UserError: it is.
        """
        embedding = getattr(model, "get_input_embeddings", lambda: None)()
        head = getattr(model, "get_output_embeddings", lambda: None)()
        tied = embedding is not None and head is not None and embedding.weight is head.weight
        if tied and self.settings.embedding != self.settings.head:
            raise UserError(
                "embedding and output layer are one weight and must have the same bits",
                where="transform int2",
                value={"embedding": self.settings.embedding, "head": self.settings.head},
                fix="set `embedding` and `head` alike",
            )
