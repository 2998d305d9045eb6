"""Dynamic loss scaling for fp16: small gradients must not become 0, and a step that overflows is left out.

Micikevicius et al., 2018, arXiv 1710.03740, section 3.2. The decision rests on the global gradient norm, so all ranks
agree; torch's own scaler decides rank by rank.
"""

from __future__ import annotations

import math
from typing import Any

START, GROW_EVERY, SMALLEST = 2.0**16, 2000, 2.0**-14


class LossScale:
    """The factor by which the loss is multiplied before the backward pass.

    Attributes:
        value: the factor; always 1 where `enabled` is false.
        good_steps: steps without overflow since it last changed.
    """

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self.value, self.good_steps = (START if enabled else 1.0), 0

    def update(self, norm: float) -> bool:
        """Take in the norm of a step's scaled gradient; whether the step may be taken.

        An overflow halves the factor; 2,000 steps without one double it.
        """
        if not self.enabled:
            return True
        if not math.isfinite(norm):
            self.value, self.good_steps = self.value / 2, 0
            return False
        self.good_steps += 1
        if self.good_steps == GROW_EVERY:
            self.value, self.good_steps = self.value * 2, 0
        return True

    @property
    def exhausted(self) -> bool:
        """Whether gradients overflow however small the factor: the training has diverged."""
        return self.value < SMALLEST

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"value": self.value, "good_steps": self.good_steps}

    def load(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave."""
        self.value, self.good_steps = state["value"], state["good_steps"]
