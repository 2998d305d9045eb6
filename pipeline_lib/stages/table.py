"""table: experiments in rows and columns, or arms compared with a baseline, as CSV and Markdown."""

from __future__ import annotations

from pipeline_lib.artifacts.files import read_json, write_bytes
from pipeline_lib.artifacts.job import Job
from pipeline_lib.reporting.comparison import make_comparison
from pipeline_lib.reporting.tables import make_grid


def run(job: Job) -> None:
    """Write table.csv and table.md from the result artifacts in `job.inputs`, by experiment or by cell."""
    results = {
        name.removeprefix("result:"): read_json(path / "result.json")["result"]
        for name, path in job.inputs.items()
        if not name.startswith("train:")
    }
    if "arms" in job.settings:
        trainings = {
            name.removeprefix("train:"): read_json(path / "train.json")["result"]
            for name, path in job.inputs.items()
            if name.startswith("train:")
        }
        made = make_comparison(job.settings, results, trainings)
    else:
        made = make_grid(job.settings, results)
    write_bytes(job.out / "table.csv", made.csv().encode())
    write_bytes(job.out / "table.md", made.markdown().encode())
