"""tokenizer: byte-level BPE trained on a dataset, or taken from a hub asset."""

from __future__ import annotations

from pipeline_lib.artifacts.job import Job
from pipeline_lib.data.tokenizer import build


def run(job: Job) -> None:
    """settings {train: {vocab_size}}, input dataset; or {hub: {repo}}, input asset → tokenizer files, info.json."""
    build(job)
