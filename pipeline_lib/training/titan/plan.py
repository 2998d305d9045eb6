"""A training job as torchtitan has to carry it out on the ranks at hand. Imports neither torch nor torchtitan."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline_lib.artifacts.job import Job
from pipeline_lib.training.batching import Sharing
from pipeline_lib.training.recipes.pretrain import Settings


@dataclass(frozen=True)
class Plan:
    """What to train and which part of every global batch is this rank's.

    Attributes:
        job: the stage's job.
        recipe: resolved settings.
        sharing: ranks, micro-batches and accumulation.
    """

    job: Job
    recipe: Settings
    sharing: Sharing

    @staticmethod
    def of(job: Job, rank: int, world: int) -> Plan:
        """The plan of one rank.

        Raises:
            UserError: the global batch cannot be spread evenly over ranks and micro-batches.
        """
        recipe = Settings(**job.settings["recipe"]).resolved()
        return Plan(job, recipe, Sharing.of(recipe.global_batch, job.execution, rank, world))

    @property
    def model(self) -> dict[str, Any]:
        """Model settings as they stand in the spec."""
        return self.job.settings["model"]

    @property
    def seed(self) -> int:
        """Of initial weights, data order and faults."""
        return self.job.settings["seed"]

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes and speaks."""
        return self.sharing.rank == 0

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole training."""
        assert self.recipe.steps is not None
        return self.recipe.steps

    @property
    def warmup_steps(self) -> int:
        """Optimizer steps of warm-up."""
        assert self.recipe.warmup_steps is not None
        return self.recipe.warmup_steps

    @property
    def sharded(self) -> bool:
        """Whether FSDP2 holds the weights: with several ranks, and wherever it provides mixed precision.

        A single rank in bf16 needs it too: autocast would leave the weights, and so their faults, in fp32.
        """
        return self.sharing.world > 1 or self.recipe.precision != "fp32"

    @property
    def checkpoints(self) -> Path:
        """Where the training's own checkpoints live."""
        return self.job.work / "checkpoints"

    def option(self, name: str, default: Any) -> Any:
        """An execution setting; null and absent mean the default."""
        value = self.job.execution.get(name)
        return default if value is None else value
