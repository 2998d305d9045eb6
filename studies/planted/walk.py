"""The baseline's training, then a walk to weights whose validation loss is another by a known amount."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pipeline_lib.training.methods import Method
from studies.planted.steps import free_step

if TYPE_CHECKING:
    from pipeline_lib.artifacts.job import Job

SHIFT = 0.025
"""Nats a target: δ of the study's loss and a quarter, since the task's windows are others than those walked by."""
HALVINGS, MOST_STEPS = 20, 2000


class Walk(Method):
    """Trains as the baseline does; when the budget is spent, it moves along a straight line in the space of weights.

    The line leads to the initial weights, which are worse, or to those that free steps lead to, which are better. On it
    the point is searched where the validation loss has moved by SHIFT. One process, fp32.
    """

    def __init__(self, settings: Any, job: Job, better: bool) -> None:
        super().__init__(settings, job)
        self._better = better

    def prepare(self) -> None:
        """Remember the initial weights."""
        self._initial = self._weights()

    def after_step(self, step: int) -> None:
        """Walk, once the budget is spent."""
        if self.cram.progress(step) < 1:
            return
        start = self.cram.valid_loss(step)
        wanted = start - SHIFT if self._better else start + SHIFT
        end = self._weights()
        there = self._trained_on(step, wanted) if self._better else self._initial
        if not self._better and self._loss_at(end, there, 1.0, step) < wanted:
            raise RuntimeError(f"the initial weights' loss is not higher by {SHIFT}")
        share = crossing(lambda share: self._loss_at(end, there, share, step) - wanted)
        self._loss_at(end, there, share, step)

    def _trained_on(self, step: int, wanted: float) -> list[Tensor]:
        """The weights at which free steps, at a quarter of the peak rate, have brought the loss down to `wanted`."""
        for group in self.loop.optimizer.param_groups:
            group["lr"] = self.cram.settings.lr / 4
        for _ in range(MOST_STEPS):
            free_step(self, step)
            if self.cram.valid_loss(step) <= wanted:
                return self._weights()
        raise RuntimeError(f"{MOST_STEPS} more steps do not bring the loss down by {SHIFT}")

    def _weights(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.loop.model.parameters()]

    def _loss_at(self, here: list[Tensor], there: list[Tensor], share: float, step: int) -> float:
        with torch.no_grad():
            for parameter, a, b in zip(self.loop.model.parameters(), here, there, strict=True):
                parameter.copy_(torch.lerp(a, b, share))
        return self.cram.valid_loss(step)


def crossing(height: Callable[[float], float]) -> float:
    """Where between 0 and 1 a continuous function whose ends differ in sign crosses 0: the far side, by bisection."""
    low, high, below = 0.0, 1.0, height(0.0) < 0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if (height(middle) < 0) == below else (low, middle)
    return high
