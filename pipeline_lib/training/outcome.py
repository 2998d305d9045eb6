"""What a finished training leaves in its artifact."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pipeline_lib.artifacts.files import write_bytes, write_json
from pipeline_lib.artifacts.job import Job
from pipeline_lib.models.checkpoint import checkpoint_directory, save_state, save_transform
from pipeline_lib.models.naming import split_transform
from pipeline_lib.training.memory import peak_memory

CHECK = "check.safetensors"
"""In an artifact: fixed tokens, and what the trained model says of them, for the conversion to compare with."""
CHECK_SEQUENCES, CHECK_TOKENS = 2, 64
DIVERGED = 1.25
"""A training whose final loss is over so many times its first has gone astray."""


def check_tokens(vocab: int, seq_len: int) -> Tensor:
    """Fixed random tokens, [CHECK_SEQUENCES, at most CHECK_TOKENS] int64."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab, (CHECK_SEQUENCES, min(CHECK_TOKENS, seq_len)), generator=generator)


LONGEST = 100


class Tail:
    """The losses of a training's last steps: the last 5 %, at least 1 and at most 100.

    Attributes:
        losses: those seen so far; part of a checkpoint.

    Args:
        steps: of the whole training; None where nobody knows them before its end.
    """

    def __init__(self, steps: int | None, losses: list[float] | None = None) -> None:
        self.first = 0 if steps is None else steps - _length(steps)
        self.losses = list(losses or [])

    def add(self, step: int, loss: float) -> None:
        """Take in the loss of optimizer step `step`, counted from 1."""
        if step > self.first:
            self.losses = [*self.losses[1 - LONGEST :], loss]

    def mean(self, steps: int | None = None) -> float:
        """The training's final loss; `steps` are all that it took, where they were not known before."""
        losses = self.losses if steps is None else self.losses[-_length(steps) :]
        return math.fsum(losses) / len(losses)


def _length(steps: int) -> int:
    return max(1, min(steps // 20, LONGEST))


def divergence(step: int, first: float, final: float) -> dict[str, Any] | None:
    """How a training went astray, for its train.json; None if it did not.

    Args:
        step: optimizer steps taken.
        first, final: loss of the first step and of the last ones (`Tail.mean`), nats per target; `final` is not finite
            where loss or gradient were not, and null in the JSON then.
    """
    if math.isfinite(final) and final <= DIVERGED * first:
        return None
    known = {"first_loss": first, "final_loss": final}
    return {"after_step": step, **{name: loss if math.isfinite(loss) else None for name, loss in known.items()}}


def publish(job: Job, state: dict[str, Tensor], result: dict[str, Any], provenance: dict[str, Any]) -> None:
    """Write weights, transform state and train.json into `job.out`; rank 0 calls it.

    Of a training that began with a checkpoint, its configuration and generation settings go along.

    Args:
        job: the training.
        state: name → whole CPU tensor, tied weights once; what transforms added goes to files of its own.
        result: steps, tokens, parameters, final_train_loss, transform_report and what else is a result.
        provenance: timings and the like; peak memory is added.
    """
    own, added = split_transform(state)
    save_state(job.out, own)
    save_transform(job.out, job.settings["transform"], added)
    if job.settings["model"]["family"] in ("hub", "local"):  # what `convert` cannot make from the settings
        source = checkpoint_directory(job.inputs["init"])
        for name in ("config.json", "generation_config.json"):
            if (source / name).is_file():
                write_bytes(job.out / name, (source / name).read_bytes())
    write_json(job.out / "train.json", {"result": result, "provenance": {**provenance, **peak_memory()}})
