"""teacher: a model's own sampled answers to prompts, the data of distillation."""

from __future__ import annotations

from pipeline_lib.artifacts.job import Job
from pipeline_lib.training.teacher import build


def run(job: Job) -> None:
    """settings {data, dtype}, inputs model and dataset-0 … → records.jsonl, teacher.json."""
    build(job)
