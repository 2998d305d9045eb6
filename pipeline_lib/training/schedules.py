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


def budget_lr_factor(progress: float, warmup: float, decay: Decay, min_factor: float) -> float:
    """The same as a function of the share of a budget spent: up to 1 at `warmup`, then down to `min_factor` at 1.

    With a warm-up of a half and linear decay to 0 this is the one cycle of Kaddour et al., 2023 (arXiv 2307.06440): 2p,
    then 2 - 2p. It does not go below `min_factor` where the last step spends more than is left.
    """
    if progress < warmup:
        return progress / warmup
    if decay == "constant":
        return 1.0
    share = min((progress - warmup) / (1.0 - warmup), 1.0)
    shape = 1.0 - share if decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * share))
    return min_factor + (1.0 - min_factor) * shape


# -- restarts (ReLoRA) -------------------------------------------------------------------------------------------------


def is_merge(step: int, every: int, schedule: str) -> bool:
    """Whether a merge follows optimizer step `step`, counted from 1.

    jagged: steps R, 2R, …; published: R + 1, 2R + 1, …, as alex4321/bitlinear merges.
    """
    passed = step - (schedule == "published")
    return passed > 0 and passed % every == 0


def jagged_lr_factor(step: int, base: float, every: int, warmup: int) -> float:
    """The base schedule with a warm-up after each merge (Lialin et al., 2023, arXiv 2307.05695, figure 2).

    Step `step` (counted from 0) is the r-th since the last merge, r = step mod every, and gets base·(r+1)/(W+1) where
    r < W. So no step is wasted on a rate of 0. The first cycle has the base's own warm-up only.
    """
    since = step % every
    return base if step < every or since >= warmup else base * (since + 1) / (warmup + 1)


def published_lr_factor(
    step: int, steps: int, warmup_steps: int, min_factor: float, every: int, reset_warmup: int
) -> float:
    """The schedule of alex4321/bitlinear: s/w, then linear decay, times r/W in the first W steps of every cycle.

    Its rate is 0 at steps 0, R, 2R …; these are the steps that end in a merge.
    """
    if step < warmup_steps:
        base = step / warmup_steps
    else:
        progress = min((step - warmup_steps) / max(steps - warmup_steps, 1), 1.0)
        base = min_factor + (1.0 - min_factor) * (1.0 - progress)
    since = step % every
    return base * since / reset_warmup if since < reset_warmup else base
