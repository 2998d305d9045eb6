"""The repeated layers of a transformer."""

from __future__ import annotations

from torch import nn


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated layers, in order: the units of sharding, recomputation and compilation."""
    return [layer for part in model.modules() if isinstance(part, nn.ModuleList) for layer in part]
