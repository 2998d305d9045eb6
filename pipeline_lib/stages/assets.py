"""assets: files from the hub, the web or a folder of the user's that later stages need offline and unchanged."""

from __future__ import annotations

from pipeline_lib.artifacts.job import Job
from pipeline_lib.data.snapshot import build


def run(job: Job) -> None:
    """settings {kind: hub, repo, repo_type, revision, patterns}, {kind: url, url, sha256, name} or {kind: local, files:
    {name: sha256}} (with execution {path}) → files/."""
    build(job)
