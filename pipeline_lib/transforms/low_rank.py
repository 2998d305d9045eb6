"""Low-rank adapters beside frozen linear weights: y = x·Wᵀ + (x·Aᵀ)·Bᵀ (Hu et al., 2021, arXiv 2106.09685)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline_lib.config.errors import UserError
from pipeline_lib.models.blocks import blocks
from pipeline_lib.models.naming import ADAPTER
from pipeline_lib.transforms.compose import SiteFunctions
from pipeline_lib.transforms.modules import reclass
from pipeline_lib.transforms.state import assign, whole

Start = Literal["xavier", "orthogonal"]


class Adapter(nn.Module):
    """The update B·A of a weight [out, in], times a factor; fp32.

    Attributes:
        A: [rank, in].
        B: [out, rank]; zero at the start, so that the layer computes what it did.
    """

    def __init__(self, shape: Sequence[int], rank: int, factor: float, start: Start) -> None:
        super().__init__()
        outputs, features = shape
        rank = min(rank, outputs, features)  # more than the full rank would add nothing
        self.factor, self.start = factor, start
        self.A = nn.Parameter(torch.empty(rank, features))
        self.B = nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] → [..., out]."""
        update = F.linear(F.linear(x, self.A), self.B)
        return update if self.factor == 1 else update * self.factor

    @torch.no_grad()
    def delta(self, first: int = 0, last: int | None = None) -> Tensor:
        """Rows first … last of the update, fp32; of a sharded adapter all ranks must ask."""
        return whole(self.B)[first:last] @ whole(self.A) * self.factor

    @torch.no_grad()
    def reset(self, key: str) -> None:
        """B becomes 0 and A is drawn anew: a function of `key` alone, whatever the rank, device or sharding.

        `xavier`: uniform within ±√(6 / (rank + in)) (Glorot and Bengio, 2010). `orthogonal`: orthonormal rows.
        """
        digest = hashlib.sha256(f"adapter/{key}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        value = torch.empty(self.A.shape)
        if self.start == "orthogonal":
            nn.init.orthogonal_(value, generator=generator)
        else:
            nn.init.xavier_uniform_(value, generator=generator)
        assign(self.A, value)
        assign(self.B, torch.zeros(self.B.shape))


class LinearWithAdapter:
    """Mixin before a linear layer, transformed or not, that holds an `Adapter`.

    At a site the adapter gets what the layer's own product gets: an input with its faults.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    low_rank: Adapter

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] → [..., out]."""
        if hasattr(self, "functions_at_site"):
            return super().forward(input)  # type: ignore[misc]  # it comes back to `_multiply`
        assert self.weight is not None
        return self._multiply(input, self.weight)

    def _multiply(self, input: Tensor, weight: Tensor | dict[str, Tensor], first_sequence: int = 0) -> Tensor:
        if isinstance(weight, Tensor) and not torch.is_autocast_enabled(input.device.type):
            weight = weight.to(input.dtype)  # a frozen weight may be held in half precision
        if hasattr(self, "functions_at_site"):
            own: Tensor = super()._multiply(input, weight, first_sequence)  # type: ignore[misc]
        else:
            assert isinstance(weight, Tensor)
            own = F.linear(input, weight, self.bias)
        return own + self.low_rank(input)


def add_adapters(
    model: nn.Module, patterns: Sequence[str], rank: int, factor: float = 1.0, start: Start = "xavier"
) -> dict[str, Any]:
    """Give the linear layers inside the model's blocks an adapter each; name → layer, in the model's order.

    Raises:
        UserError: a pattern names no linear layer.
    """
    names = {id(module): name for name, module in model.named_modules()}
    linears = {names[id(m)]: m for block in blocks(model) for m in block.modules() if isinstance(m, nn.Linear)}
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in linears):
            raise UserError(
                "the pattern names no linear layer that could have an adapter",
                where="recipe.targets",
                value=pattern,
                allowed=f"patterns on {', '.join(list(linears)[:8])}, …",
                fix="compare the pattern with the names above; * crosses dots",
            )
    chosen: dict[str, Any] = {n: m for n, m in linears.items() if any(fnmatchcase(n, p) for p in patterns)}
    for layer in chosen.values():
        adapter = Adapter(layer.weight.shape, rank, factor, start)
        layer.add_module(ADAPTER, adapter)
        reclass(layer, LinearWithAdapter)
    return chosen


def freeze(layer: Any, dtype: torch.dtype) -> None:
    """Hold a layer's weight for products only: packed where its transform can, else frozen in `dtype`."""
    functions: SiteFunctions | None = getattr(layer, "functions_at_site", None)
    weight = layer.weight.detach()
    if functions is not None and can_pack(functions):
        assert functions.store is not None
        functions.store.pack(weight, "weight")
        layer.register_parameter("weight", None)
    else:
        layer.weight = nn.Parameter(weight.to(dtype), requires_grad=False)


def can_pack(functions: SiteFunctions) -> bool:
    """Whether the site's weight can be held as stored tensors alone."""
    store = functions.store
    return store is not None and "weight" in store.roles and store.can_pack
