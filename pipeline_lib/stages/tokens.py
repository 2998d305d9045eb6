"""tokens: a dataset's documents as packed token shards."""

from __future__ import annotations

from pipeline_lib.artifacts.job import Job
from pipeline_lib.data.pack import build


def run(job: Job) -> None:
    """settings {max_tokens}, inputs dataset and tokenizer → {train,valid,test}-00000.safetensors …, tokens.json."""
    build(job)
