"""Selective backprop: train on the sequences that the model finds hard, chosen by a forward pass alone.

Jiang et al., 2019, Accelerating deep learning by focusing on the biggest losers (arXiv 1910.00762), as Kaddour et al.,
2023 (arXiv 2307.06440, section 5.1) set it up for masked language models.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from pipeline_lib.config.base import Settings as Base
from pipeline_lib.training.budget import unfit_count
from pipeline_lib.training.methods import Method

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline_lib.artifacts.job import Job
    from pipeline_lib.config.schema import Model
    from pipeline_lib.training.hooks import Batch
    from pipeline_lib.training.recipes.cram import Settings as Recipe


class Settings(Base):
    """A sequence is trained on with probability percentile^beta of its loss among the last ones seen."""

    type: Literal["selective-backprop"] = "selective-backprop"
    beta: float = Field(1.0, ge=0, description="1 keeps about a half, 2 a third, 0 all")
    history: int = Field(
        5000, ge=1, description="losses that a loss is compared with: the last ones, its own among them"
    )
    candidates: int = Field(128, ge=1, description="sequences that are looked at together")


def refuses(settings: Settings, recipe: Recipe, model: Model) -> str | None:
    """The budget must know what looking costs."""
    return unfit_count(recipe.budget, "candidates", settings.candidates) if recipe.track_forward_pass_only else None


def method(settings: Settings, job: Job) -> Method:
    """The method."""
    return SelectiveBackprop(settings, job)


class SelectiveBackprop(Method):
    """Candidates, their history of losses, and a queue of chosen ones; what a step leaves in it waits for the next.

    Attributes:
        seen, chosen: sequences so far.
    """

    def prepare(self) -> None:
        """Begin with nothing."""
        import torch

        self.losses_N: Tensor = torch.empty(0)
        self.queue: Batch = {}
        self.seen = self.chosen = 0

    def draw(self, step: int, count: int, below: Callable[[int], Batch]) -> Batch:
        """Look at candidates until the queue holds `count`."""
        import torch

        while self._waiting() < count:
            candidates = below(self.settings.candidates)
            losses_B = self.cram.losses(candidates, step)
            self.losses_N = torch.cat([self.losses_N, losses_B])[-self.settings.history :]
            keep_B = percentiles(self.losses_N, losses_B) ** self.settings.beta > self._draws(candidates["place"])
            for name, tensor in candidates.items():
                new = tensor[keep_B]
                self.queue[name] = torch.cat([self.queue[name], new]) if name in self.queue else new
            self.seen, self.chosen = self.seen + len(losses_B), self.chosen + int(keep_B.sum())
        batch = {name: tensor[:count] for name, tensor in self.queue.items()}
        self.queue = {name: tensor[count:].clone() for name, tensor in self.queue.items()}
        return batch

    def _waiting(self) -> int:
        return len(self.queue["place"]) if self.queue else 0

    def _draws(self, place_B: Tensor) -> Tensor:
        """Uniform numbers of the sequences at these places; float64 [B]."""
        import torch

        digest = hashlib.sha256(f"selective-backprop/{self.seed}/{int(place_B[0])}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        return torch.rand(len(place_B), generator=generator, dtype=torch.float64)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """History and queue."""
        queue = {f"queue/{name}": tensor for name, tensor in self.queue.items()}
        return {"losses": self.losses_N, **queue}, {"seen": self.seen, "chosen": self.chosen}

    def load(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Take back what `state` gave."""
        self.losses_N = tensors.pop("losses")
        self.queue = {name.removeprefix("queue/"): tensor for name, tensor in tensors.items()}
        self.seen, self.chosen = values["seen"], values["chosen"]

    def result(self) -> dict[str, Any]:
        """How many it looked at, and how many it chose."""
        return {"seen": self.seen, "chosen": self.chosen, "share": self.chosen / max(self.seen, 1)}


def percentiles(history_N: Tensor, values_B: Tensor) -> Tensor:
    """The share of a history that is below each value, half of what is equal to it counted; float64 [B].

    The mean rank of scipy's percentileofscore with kind "rank": (below + at most + [any equal]) / 2n.
    """
    import torch

    sorted_N = history_N.sort().values
    below_B = torch.searchsorted(sorted_N, values_B, right=False).double()
    at_most_B = torch.searchsorted(sorted_N, values_B, right=True).double()
    return (below_B + at_most_B + (at_most_B > below_B)) / (2 * len(history_N))
