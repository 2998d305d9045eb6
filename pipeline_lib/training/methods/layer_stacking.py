"""Layer stacking: a shallow model first, whose layers are copied on top of each other as training goes on.

Gong et al., 2019, Efficient training of BERT by progressively stacking (ICML); as Kaddour et al., 2023 (arXiv
2307.06440, section 4.1) set it up under a budget: 4, 8, 16 layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from pipeline_lib.config.base import Settings as Base
from pipeline_lib.training.methods import Method

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from pipeline_lib.artifacts.job import Job
    from pipeline_lib.config.schema import Model


class Settings(Base):
    """The number of layers doubles whenever the budget's spent share reaches the next of `at`."""

    type: Literal["layer-stacking"] = "layer-stacking"
    initial_layers: int = Field(4, ge=1, description="layers at the start")
    at: tuple[float, ...] = Field(
        (0.125, 0.3), min_length=1, description="spent shares of the budget at which it grows"
    )
    order: Literal["stacked", "interleaved"] = Field(
        "stacked", description="of layers A B doubled: A B A B (stacked), or A A B B (interleaved)"
    )
    optimizer_state: Literal["kept", "copied", "reset"] = Field(
        "kept",
        description="of layers at growth: kept where a layer was, empty for its copy; copied along; or all of it reset",
    )

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        if list(self.at) != sorted(set(self.at)) or not 0 < self.at[0] <= self.at[-1] < 1:
            raise ValueError(f"at must ascend between 0 and 1, and is {list(self.at)}")
        return self

    @property
    def final_layers(self) -> int:
        """Layers at the end."""
        return self.initial_layers * 2 ** len(self.at)


def refuses(settings: Settings, recipe: Any, model: Model) -> str | None:
    """Why it makes no sense, or None."""
    own = model.llama or model.mistral or model.bert
    if own is not None and own.layers != settings.final_layers:
        return (
            f"{settings.initial_layers} layers doubled {len(settings.at)} times are {settings.final_layers}, "
            f"and the model has {own.layers}"
        )
    return None


def method(settings: Settings, job: Job) -> Method:
    """The method."""
    return LayerStacking(settings, job)


class LayerStacking(Method):
    """The whole model is there from the start; only its first `depth` layers are used.

    Attributes:
        depth: layers in use.
    """

    def prepare(self) -> None:
        """Begin with the first layers; a checkpoint's depth comes with `load`."""
        if self.cram.depth != self.settings.final_layers:
            raise ValueError(f"stacking ends at {self.settings.final_layers} layers; the model has {self.cram.depth}")
        self.depth: int = self.settings.initial_layers

    def before_step(self, step: int) -> None:
        """Grow as often as the budget's spent share says."""
        reached = sum(self.cram.progress(step) >= share for share in self.settings.at)
        while self.depth < self.settings.initial_layers * 2**reached:
            self._double()

    def _double(self) -> None:
        from pipeline_lib.models.blocks import blocks

        stacked = self.settings.order == "stacked"
        layers, old, new = blocks(self.loop.model), self.depth, 2 * self.depth
        source = [i % old if stacked else i // 2 for i in range(new)]
        home = [i < old if stacked else i % 2 == 0 for i in range(new)]  # where the layer itself is, not its copy
        copy_layers(layers, source)
        how = self.settings.optimizer_state
        if how == "reset":
            self.loop.optimizer.state.clear()
        else:
            copy_state(self.loop.optimizer, layers, source, home if how == "kept" else [True] * new)
        self.depth = new

    def layers(self, active: Sequence[int], step: int, first: int, training: bool) -> Sequence[int]:
        """The first ones, for every pass."""
        return [layer for layer in active if layer < self.depth]

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The depth."""
        return {}, {"depth": self.depth}

    def load(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Take back what `state` gave."""
        self.depth = values["depth"]

    def result(self) -> dict[str, Any]:
        """The depth at the end."""
        return {"layers": self.depth}


def copy_layers(layers: Sequence[torch.nn.Module], source: Sequence[int]) -> None:
    """Layer i gets the values of layer source[i]; no tensor is shared, and each may be sharded."""
    import torch

    with torch.no_grad():
        values = [[tensor.clone() for tensor in _tensors(layers[index])] for index in sorted(set(source))]
        for layer, index in zip(layers, source, strict=False):
            for tensor, value in zip(_tensors(layer), values[index], strict=True):
                tensor.copy_(value)


def copy_state(
    optimizer: torch.optim.Optimizer, layers: Sequence[torch.nn.Module], source: Sequence[int], gets: Sequence[bool]
) -> None:
    """Layer i gets the optimizer state of layer source[i] where gets[i], and an empty one elsewhere."""
    states = [
        [{name: value.clone() for name, value in optimizer.state.get(p, {}).items()} for p in layer.parameters()]
        for layer in layers
    ]
    for number, (index, takes) in enumerate(zip(source, gets, strict=True)):
        for parameter, state in zip(layers[number].parameters(), states[index], strict=True):
            optimizer.state.pop(parameter, None)
            if takes and state:
                optimizer.state[parameter] = {name: value.clone() for name, value in state.items()}


def _tensors(layer: torch.nn.Module) -> list[Tensor]:
    return [*layer.parameters(), *layer.buffers()]
