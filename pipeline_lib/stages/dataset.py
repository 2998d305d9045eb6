"""dataset: the documents of a source, divided into train, valid and test."""

from __future__ import annotations

from pipeline_lib.artifacts.job import Job
from pipeline_lib.data.dataset import build


def run(job: Job) -> None:
    """settings {source, split, max_bytes, seed} → {train,valid,test}-00000.parquet …, dataset.json."""
    build(job)
