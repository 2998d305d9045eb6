"""The repeated layers of a transformer."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated layers, in order: the units of sharding, recomputation and compilation."""
    return [layer for part in model.modules() if isinstance(part, nn.ModuleList) for layer in part]


@contextmanager
def only(model: nn.Module, active: Collection[int], present: Collection[int] = ()) -> Iterator[None]:
    """Inside, the model runs its layers of these numbers alone; a layer left out passes its input on.

    Args:
        present: layers that pass their input on as well, but get a gradient of 0: where a model is sharded, ranks that
            leave a layer out must take part in gathering it and in summing its gradient when another rank runs it.

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
    run = sorted({*active, *present})
    if len(run) < len(layers):
        setattr(owner, name, nn.ModuleList(layers[index] for index in run))
    idle = [layers[index] for index in run if index not in active]
    for layer in idle:
        layer.forward = partial(_pass_on, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        setattr(owner, name, layers)
        for layer in idle:
            del layer.forward


def _pass_on(layer: nn.Module, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
    nothing = sum(parameter.flatten()[0] * 0 for parameter in layer.parameters())
    return hidden + torch.as_tensor(nothing).to(hidden.dtype)
