"""What a recipe decides: batch → select → loss → backward → after_step → budget.

A recipe of the engines `hf` and `loop` derives from `Hooks` and overrides what it needs; the engine owns
the order of things, devices, sharding, accumulation, faults' bookkeeping, checkpoints and metrics. `hf`
refuses a recipe that overrides what the Trainer decides itself (`LOOP_ONLY`).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from pipeline_lib.config.errors import UserError
from pipeline_lib.training.losses import count_targets, cross_entropy_per_example
from pipeline_lib.training.schedules import lr_factor
from pipeline_lib.training.settings import TrainingSettings
from pipeline_lib.training.state import full_state

if TYPE_CHECKING:
    from pipeline_lib.data.tokens import BatchLoader
    from pipeline_lib.training.loop import Loop

Batch = dict[str, Tensor]
"""input_ids [B, T] and labels [B, T] int64 (shifted already, -100 = no target), and what a recipe adds;
every tensor has the sequences in its leading dimension."""


class Hooks:
    """A plain training on packed text; recipes override.

    Attributes:
        settings: the recipe's settings, steps resolved.
        seed: the experiment's seed; randomness of a hook comes from it, the step and the sequence's index
            alone, so that no rank, accumulation or resume changes it.
    """

    LOOP_ONLY: ClassVar[tuple[str, ...]] = (
        "loader", "targets", "prepare", "read", "select", "begin", "backward", "after_step", "progress", "result",
        "state", "load", "save", "restore", "whole",
    )  # fmt: skip

    def __init__(self, settings: TrainingSettings, seed: int) -> None:
        self.settings, self.seed = settings, seed

    def loader(self) -> Any:
        """What batches are read from, if not from token shards: something with `batch(step, first, count)`."""
        return None

    def targets(self, batch: Batch) -> int:
        """What a batch adds to the number that the step's summed loss is divided by."""
        return count_targets(batch["labels"])

    def adapt(self, model: nn.Module) -> None:
        """Called once on the model with its weights, on the CPU, before it gets its transform: freeze, add adapters."""

    def export(self, model: nn.Module, state: dict[str, Tensor], out: Path) -> dict[str, Tensor]:
        """What is published of a finished training; rank 0 calls it.

        Args:
            model: as it was trained; a hook may change it, nothing needs it afterwards.
            state: name → whole CPU tensor, tied weights once.
            out: the artifact; a hook may write files of its own.

        Returns:
            name → tensor, under the names of the model that `adapt` was given.
        """
        return state

    def prepare(self, loop: Loop) -> None:
        """Called once, after the model has its transform and weights and before it is sharded (a teacher)."""

    def batch(self, loader: BatchLoader, step: int, first: int, count: int) -> Batch:
        """The sequences `first` … `first + count` of the global batch of `step`, on the CPU."""
        inputs_BT, labels_BT = loader.batch(step, first, count)
        return {"input_ids": inputs_BT, "labels": labels_BT}

    def read(self, loop: Loop, step: int) -> list[tuple[int, Batch]]:
        """This rank's micro-batches of a step, on the CPU: (index of the first sequence in the global batch, batch)."""
        count = loop.sharing.micro_batch
        return [(first, self.batch(loop.loader, step, first, count)) for first in loop.sharing.firsts()]

    def select(self, loop: Loop, step: int, batches: list[tuple[int, Batch]]) -> list[tuple[int, Batch]]:
        """Choose among this rank's micro-batches of a step: (index of the first sequence, batch) pairs."""
        return batches

    def begin(self, step: int, first: int) -> None:
        """Called before the forward pass of the micro-batch that begins with sequence `first` of the global batch."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """loss_B: fp32, summed over each sequence's targets; the engine divides by the targets of the whole step."""
        # Labels are not handed to the model: it would shift them again and average too early.
        logits_BTV = model(input_ids=batch["input_ids"], use_cache=False).logits
        return cross_entropy_per_example(logits_BTV, batch["labels"])

    def backward(self, loop: Loop, loss: Tensor) -> None:
        """Add the gradient of a micro-batch's scalar loss."""
        loss.backward()

    def after_step(self, loop: Loop, step: int) -> None:
        """Called after optimizer step `step` (counted from 1) and before a checkpoint: merges, growth, costs."""

    def progress(self, step: int) -> float:
        """Share of the budget spent after `step` optimizer steps; training ends at 1."""
        return step / self._steps

    def lr_factor(self, step: int) -> float:
        """What the peak learning rate is multiplied by in optimizer step `step` (counted from 0)."""
        recipe = self.settings
        return lr_factor(step, self._steps, recipe.warmup_steps or 0, recipe.decay, recipe.min_lr_factor)

    def optimizer(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        """AdamW; matrices decay, norms and biases (at most one dimension) do not."""
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": self.settings.weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        recipe = self.settings
        return torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=recipe.lr,
            betas=recipe.betas,
            eps=recipe.eps,
            fused=True,
        )

    def result(self, loop: Loop) -> dict[str, Any]:
        """What train.json holds beside what every training leaves; all ranks call it at the end."""
        return {}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What the hooks must remember across a resume: (tensors, JSON values)."""
        return {}, {}

    def load(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Take back what `state` gave."""

    def save(self, directory: Path) -> None:
        """Write what this rank alone holds into a checkpoint that is not sealed yet; all ranks call it."""

    def restore(self, loop: Loop, directory: Path) -> None:
        """Read what `save` wrote, after the model, the optimizer and `load` have their state back."""

    def host_memory(self) -> int:
        """Bytes of tensors that the recipe keeps on the host, of this rank."""
        return 0

    def whole(self, loop: Loop) -> dict[str, Tensor]:
        """The weights that the training leaves: on rank 0 name → whole CPU tensor, on the others nothing."""
        return full_state(loop.model)

    @property
    def _steps(self) -> int:
        assert self.settings.steps is not None  # resolved while planning
        return self.settings.steps


def refuse_loop_hooks(hooks: Hooks, name: str) -> None:
    """Make sure that a recipe of this engine changes nothing that the Trainer decides.

    Raises:
        UserError: it overrides a hook that this engine would never call.
    """
    changed = [hook for hook in Hooks.LOOP_ONLY if getattr(type(hooks), hook) is not getattr(Hooks, hook)]
    if changed:
        raise UserError(
            f"recipe '{name}' changes what the Trainer decides itself",
            value=", ".join(changed),
            fix="set ENGINE = 'loop' in the recipe",
        )
