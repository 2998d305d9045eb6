"""Learning-rate schedules as pure functions of the step."""

from __future__ import annotations

import math
from typing import Literal

Decay = Literal["linear", "cosine", "constant"]


def lr_factor(step: int, steps: int, warmup_steps: int, decay: Decay, min_factor: float) -> float:
    """What the peak learning rate is multiplied by in optimizer step `step` (counted from 0).

    Warm-up is (s+1)/(W+1), so that no step is wasted on a rate of 0; it reaches 1 at s = W. The decay
    then falls from 1 to `min_factor`, which it would reach at s = `steps`.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if decay == "constant":
        return 1.0
    progress = min((step - warmup_steps) / max(steps - warmup_steps, 1), 1.0)
    shape = 1.0 - progress if decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return min_factor + (1.0 - min_factor) * shape
