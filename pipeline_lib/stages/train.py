"""The stage `train`: obtain an experiment's weights."""

from __future__ import annotations

from pipeline_lib.artifacts.job import Job
from pipeline_lib.training.run import run as train


def run(job: Job) -> None:
    """Train as `job.settings` say.

    Inputs: tokens, tokenizer, and by recipe init, clip, teacher, losses. Leaves model.safetensors (sharded
    above 5 GB), train.json and log/metrics.jsonl.

    Raises:
        Stopped: asked to stop; the next run goes on from the saved state.
    """
    train(job)
