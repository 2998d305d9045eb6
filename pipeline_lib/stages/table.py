"""table: experiments in rows and columns, or arms compared with a baseline, as CSV and Markdown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline_lib.artifacts.files import read_json, write_bytes
from pipeline_lib.artifacts.job import Job
from pipeline_lib.reporting.budget_curves import curve, picture
from pipeline_lib.reporting.comparison import make_comparison
from pipeline_lib.reporting.tables import make_grid


def run(job: Job) -> None:
    """Write table.csv and table.md from the result artifacts in `job.inputs`, by experiment or by cell.

    Of a comparison also table.svg: loss over what was spent, of the arms in the last column.
    """
    if "arms" in job.settings:
        results, trainings = _by_kind(job, "result"), _by_kind(job, "train")
        read = {name: read_json(path / "result.json")["result"] for name, path in results.items()}
        trained = {name: read_json(path / "train.json")["result"] for name, path in trainings.items()}
        made = make_comparison(job.settings, read, trained)
        if trainings:
            write_bytes(job.out / "table.svg", _curves(job.settings, trainings).encode())
    else:
        made = make_grid(
            job.settings, {name: read_json(path / "result.json")["result"] for name, path in job.inputs.items()}
        )
    write_bytes(job.out / "table.csv", made.csv().encode())
    write_bytes(job.out / "table.md", made.markdown().encode())


def _by_kind(job: Job, kind: str) -> dict[str, Path]:
    """{cell: artifact} of the inputs named `<kind>:<cell>`."""
    return {role.partition(":")[2]: path for role, path in job.inputs.items() if role.startswith(f"{kind}:")}


def _curves(settings: dict[str, Any], trainings: dict[str, Path]) -> str:
    last = len(settings["columns"]) - 1
    curves = {}
    for a, arm in enumerate(settings["arms"]):
        paths = [trainings[f"{last}.{a}.{s}"] / "log" / "metrics.jsonl" for s in range(len(settings["seeds"]))]
        curves[arm] = curve([[json.loads(line) for line in path.read_text().splitlines()] for path in paths])
    return picture(curves, f"budget spent, {settings['columns'][last]}").svg
