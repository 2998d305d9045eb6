"""timing: this machine's seconds for every pass that a training of a model can make."""

from __future__ import annotations

from pipeline_lib.artifacts.job import Job
from pipeline_lib.training.timing import measure


def run(job: Job) -> None:
    """settings {model, transform, recipe}, inputs tokenizer and, of a checkpoint, init → timing.json."""
    measure(job)
