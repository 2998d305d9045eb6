"""table: experiments in rows and columns, as CSV and Markdown."""

from __future__ import annotations

from pipeline_lib.artifacts.files import read_json, write_bytes
from pipeline_lib.artifacts.job import Job
from pipeline_lib.reporting.tables import make_grid


def run(job: Job) -> None:
    """Write table.csv and table.md from the result artifacts in `job.inputs`, by experiment."""
    results = {name: read_json(path / "result.json")["result"] for name, path in job.inputs.items()}
    grid = make_grid(job.settings, results)
    write_bytes(job.out / "table.csv", grid.csv().encode())
    write_bytes(job.out / "table.md", grid.markdown().encode())
