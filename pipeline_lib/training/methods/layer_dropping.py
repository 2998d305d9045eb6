"""Layer dropping: layers are left out at random, more of them the deeper they lie and the longer training goes on.

Zhang and He, 2020, Accelerating training of Transformer-based language models with progressive layer dropping
(arXiv 2010.13369); with one gate a layer, as Kaddour et al., 2023 (arXiv 2307.06440, section 4.2). Outputs are not
rescaled, and evaluation uses all layers.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from pipeline_lib.config.base import Settings as Base
from pipeline_lib.training.budget import unfit_count
from pipeline_lib.training.methods import Method

if TYPE_CHECKING:
    from pipeline_lib.artifacts.job import Job


class Settings(Base):
    """Layer i of L is left out with probability p·i/L, where p grows from 0 to 1 - keep."""

    type: Literal["layer-dropping"] = "layer-dropping"
    keep: float = Field(0.5, gt=0, le=1, description="the least probability that the last layer is kept")
    gamma: float = Field(100.0, gt=0, description="how fast p grows: p = (1 - keep)·(1 - exp(-gamma·spent share))")
    group: int = Field(
        128, ge=1, description="sequences that go through the same layers; a smaller global batch is one group"
    )


def refuses(settings: Settings, recipe: Any, model: Any) -> str | None:
    """Why it makes no sense, or None."""
    if recipe.global_batch > settings.group and recipe.global_batch % settings.group:
        return f"its group {settings.group} does not divide global_batch {recipe.global_batch}"
    return unfit_count(recipe.budget, "group", min(settings.group, recipe.global_batch))


def method(settings: Settings, job: Job) -> Method:
    """The method."""
    return LayerDropping(settings, job)


class LayerDropping(Method):
    """Gates drawn from the seed, the step and the group of sequences alone."""

    def __init__(self, settings: Settings, job: Job) -> None:
        super().__init__(settings, job)
        self.group: int = min(settings.group, job.settings["recipe"]["global_batch"])
        self._at: tuple[int, float] = (-1, 0.0)

    def layers(self, active: Sequence[int], step: int, first: int, training: bool) -> Sequence[int]:
        """Those kept; all, should none be."""
        if not training:
            return active
        if self._at[0] != step:  # the step's own cost, once it is charged, changes nothing
            self._at = step, drop_probability(self.cram.progress(step), self.settings.keep, self.settings.gamma)
        return kept(active, self._at[1], f"layer-dropping/{self.seed}/{step}/{first // self.group}")


def drop_probability(progress: float, keep: float, gamma: float) -> float:
    """p of the last layer when this share of the budget is spent (Zhang and He, 2020, equation 5)."""
    return (1.0 - keep) * (1.0 - math.exp(-gamma * progress))


def kept(layers: Sequence[int], p: float, key: str) -> Sequence[int]:
    """The layers that stay, each of L independently: the i-th, counted from 1, goes with probability p·i/L."""
    draw = random.Random(hashlib.sha256(key.encode()).digest())
    found = [layer for i, layer in enumerate(layers, start=1) if draw.random() >= p * i / len(layers)]
    return found or layers
