"""How much of its budget a training has spent."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from pipeline_lib.artifacts.files import read_json
from pipeline_lib.training import distributed
from pipeline_lib.training.budget import Budget, Table, flop_rate, rtx3090
from pipeline_lib.training.work import Price, Work

if TYPE_CHECKING:
    from pipeline_lib.artifacts.job import Job


class Meter:
    """Work and clock of a training under a `budget`.

    Args:
        work: passes done; those of a step are charged before it is made.
        flops: what passes cost in FLOPs.

    Attributes:
        total: what may be spent, in the budget's unit.
        seconds: this machine's, in steps alone; validation, checkpoints and start-up are not among them.
        last_seconds: of the last step.
    """

    def __init__(self, budget: Budget, work: Work, flops: Price, job: Job) -> None:
        self.budget, self._work = budget, work
        self.seconds = self.last_seconds = 0.0
        self._started: float | None = None
        self._price = flops if budget.rst_hours is None else _price(budget, flops, job)
        total = budget.rst_hours or budget.flops or budget.wall_hours
        assert total is not None  # one of them is given
        self.total: float = total

    def spent(self) -> float:
        """What all steps so far cost, in the budget's unit."""
        if self.budget.wall_hours is not None:
            return self.seconds / 3600
        cost = self._work.cost(self._price)
        return cost / 3600 if self.budget.rst_hours is not None else cost

    def share(self) -> float:
        """The same as a share of the budget."""
        return self.spent() / self.total

    def ahead(self) -> float:
        """The share that the step at work will have spent: its work is charged, its time that of the step before."""
        return self.share() + (self.last_seconds / 3600 / self.total if self.budget.wall_hours is not None else 0.0)

    def start(self) -> None:
        """A step begins."""
        self._started = time.monotonic()

    def stop(self) -> None:
        """It ends; all ranks take rank 0's time."""
        assert self._started is not None
        self.last_seconds = distributed.from_first(time.monotonic() - self._started)
        self.seconds, self._started = self.seconds + self.last_seconds, None

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"seconds": self.seconds, "last_seconds": self.last_seconds}

    def load(self, values: dict[str, Any]) -> None:
        """Take back what `state` gave."""
        self.seconds, self.last_seconds = values["seconds"], values["last_seconds"]


def _price(budget: Budget, flops: Price, job: Job) -> Price:
    """Seconds of the budget's reference."""
    if budget.reference == "flops":
        rate = flop_rate()
        return lambda kind, layers, sequences: flops(kind, layers, sequences) / rate
    if budget.reference == "rtx3090":
        return rtx3090
    if budget.measured:
        return Table(seconds=read_json(job.inputs["timing"] / "timing.json")["provenance"]["seconds"]).price
    assert isinstance(budget.reference, Table)
    return budget.reference.price
