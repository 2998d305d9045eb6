"""How a global batch is shared out over ranks and micro-batches, without changing what is trained; rows of batches."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline_lib.config.errors import UserError

if TYPE_CHECKING:
    from pipeline_lib.training.hooks import Batch


@dataclass(frozen=True)
class Sharing:
    """One rank's share of every global batch.

    Attributes:
        global_batch: sequences an optimizer step.
        micro_batch: sequences a forward pass on one rank.
        rank: this rank.
        world: number of ranks.
    """

    global_batch: int
    micro_batch: int
    rank: int
    world: int

    @staticmethod
    def of(global_batch: int, execution: Mapping[str, Any], rank: int, world: int) -> Sharing:
        """The shares for execution settings; without `micro_batch` every rank takes its part at once.

        Raises:
            UserError: ranks times micro-batch do not divide the global batch.
        """
        micro = execution.get("micro_batch") or max(global_batch // world, 1)
        if global_batch % (micro * world):
            raise UserError(
                f"the global batch is not a multiple of ranks × micro-batch ({world} × {micro})",
                where="run.micro_batch" if execution.get("micro_batch") else "run.cpu_processes",
                value=micro if execution.get("micro_batch") else world,
                allowed=f"numbers whose product divides global_batch {global_batch}",
                fix="change micro_batch or the number of processes; the global batch is part of the experiment",
            )
        return Sharing(global_batch, micro, rank, world)

    @property
    def accumulation(self) -> int:
        """Micro-steps an optimizer step."""
        return self.global_batch // (self.micro_batch * self.world)

    def firsts(self) -> list[int]:
        """Index in the global batch of the first sequence of each of this rank's micro-batches."""
        stride = self.world * self.micro_batch
        return [micro_step * stride + self.rank * self.micro_batch for micro_step in range(self.accumulation)]


def micro_seed(seed: int, step: int, first: int) -> int:
    """Seed of torch's own generator (dropout) for the micro-batch that begins with sequence `first`.

    Torch's generator is set anew for every micro-batch, so that its state is a function of the position in
    the training: a resumed run needs no saved generator to go on with the same draws.
    """
    digest = hashlib.sha256(f"micro-batch/{seed}/{step}/{first}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def length(batch: Batch) -> int:
    """Sequences of a batch."""
    return len(batch["input_ids"])


def rows_of(batch: Batch, first: int, count: int) -> Batch:
    """Rows first … first+count-1."""
    return {name: tensor[first : first + count] for name, tensor in batch.items()}


def joined(batches: Sequence[Batch]) -> Batch:
    """One batch after another."""
    import torch

    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
