"""assets: files from the hub or the web that later stages need offline."""

from __future__ import annotations

from pipeline_lib.artifacts.job import Job
from pipeline_lib.data.snapshot import build


def run(job: Job) -> None:
    """settings {kind: hub, repo, repo_type, revision, patterns} or {kind: url, url, sha256, name} → files/."""
    build(job)
