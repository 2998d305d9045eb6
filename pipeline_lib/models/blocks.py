"""The repeated layers of a transformer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated layers, in order: the units of sharding, recomputation and compilation."""
    return [layer for part in model.modules() if isinstance(part, nn.ModuleList) for layer in part]


@contextmanager
def only(model: nn.Module, active: Sequence[int]) -> Iterator[None]:
    """Inside, the model runs its layers of these numbers alone, in this order; a layer left out passes its input on.

    Raises:
        ValueError: the model has more than one list of layers.
    """
    found = [
        (owner, name, part)
        for owner in model.modules()
        for name, part in owner.named_children()
        if isinstance(part, nn.ModuleList)
    ]
    if len(found) != 1:
        raise ValueError(f"a model with {len(found)} lists of layers: which of them may leave some out is unknown")
    [(owner, name, layers)] = found
    if list(active) == list(range(len(layers))):
        yield
        return
    setattr(owner, name, nn.ModuleList(layers[index] for index in active))
    try:
        yield
    finally:
        setattr(owner, name, layers)
