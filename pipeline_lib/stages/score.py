"""score: the loss of every training sequence under a model trained on the holdout, or imported."""

from __future__ import annotations

from pipeline_lib.artifacts.job import Job
from pipeline_lib.training.score import build


def run(job: Job) -> None:
    """settings {seq_len, masks, dtype}, inputs tokens, and model and tokenizer or imported → losses.safetensors,
    score.json."""
    build(job)
