"""Efficient-training methods: one file each, found by its name, composed by recipe `cram`.

`layer_stacking.py` is `layer-stacking` in config.yaml. A method's module imports no torch at its top and holds

* `Settings`, with `type: Literal["<name>"]` and every hyper-parameter with its default and description;
* `method(settings, job) -> Method`;
* where need be `refuses(settings, recipe, model) -> str | None`: why it makes no sense in a recipe (`recipe.methods`
  are all methods of it) on a model of config.yaml, read while planning;
* `OPTIMIZER = True`, if it brings an optimizer; a recipe has at most one such method;
* `NEEDS = ("losses",)`, if the experiment must name what gives it its per-example losses;
* `reads(settings, recipe) -> float`, if it reads more sequences than are trained on: how many for each.

Packages outside Errata add theirs by the entry-point group `errata.methods`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from pipeline_lib.artifacts.job import Job
    from pipeline_lib.training.cram import CramHooks
    from pipeline_lib.training.hooks import Batch
    from pipeline_lib.training.loop import Loop


class Method:
    """What an efficient-training method changes; it overrides the hooks that it needs.

    Hooks are called in the order of the recipe's list. All ranks call all of them, at the same time. Randomness comes
    from the seed and the place in the training alone, so that no rank, micro-batch or resume changes it.

    Attributes:
        settings: the method's own.
        seed: the experiment's.
        cram: gives fresh text, per-example losses and the account of work; set before `prepare`.
        loop: model, optimizer and step; set before `prepare`.
        group: sequences that go through the same layers; None where all of a step do.
        lr: peak learning rate in place of the recipe's, for a method that brings an optimizer.
    """

    group: int | None = None
    lr: float | None = None
    cram: CramHooks
    loop: Loop

    def __init__(self, settings: Any, job: Job) -> None:
        self.settings: Any = settings
        self.seed: int = job.settings["seed"]

    def prepare(self) -> None:
        """Called once, when the model has its weights and transform and is neither on its device nor sharded."""

    def before_step(self, step: int) -> None:
        """Called before the text of optimizer step `step` (counted from 0) is read: growth, curvature.

        `cram.progress(step)` is the share of the budget that the steps before have spent.
        """

    def draw(self, step: int, count: int, below: Callable[[int], Batch]) -> Batch:
        """The `count` sequences that step `step` trains on, on the CPU, the same on every rank.

        Args:
            below: gives as many fresh sequences as it is asked for: `input_ids`, `labels`, `sequence` (its number in
                the training text) and `place` (its place in all text read so far), from the method before in the list.
        """
        return below(count)

    def layers(self, active: Sequence[int], step: int, first: int, training: bool) -> Sequence[int]:
        """Which of the `active` layers the sequences of the global batch from `first` on go through.

        Args:
            training: False in passes that only look: selection, validation.
        """
        return active

    def weigh(self, batch: Batch, loss_B: Tensor) -> Tensor:
        """The losses of a micro-batch's sequences (fp32, summed over their targets), weighed."""
        return loss_B

    def optimizer(self, matrices: list[Tensor], others: list[Tensor]) -> Optimizer | None:
        """The optimizer; None leaves it to the recipe.

        Its state must be tensors. The engine sets every group's `lr` before a step.

        Args:
            matrices: parameters to which weight decay applies.
            others: those to which it does not.
        """
        return None

    def lr_factor(self, progress: float) -> float:
        """What the schedule's learning rate is multiplied by; progress is the budget's share spent after this step."""
        return 1.0

    def after_step(self, step: int) -> None:
        """Called after optimizer step `step` (counted from 1) and before a checkpoint."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What must outlive a kill: (tensors, JSON values)."""
        return {}, {}

    def load(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Take back what `state` gave."""

    def result(self) -> dict[str, Any]:
        """What train.json tells of it; all ranks call it at the end."""
        return {}
