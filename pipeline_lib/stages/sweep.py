"""sweep: the points of a grid, collected into one CSV."""

from __future__ import annotations

from pipeline_lib.artifacts.files import read_json, write_bytes, write_json
from pipeline_lib.artifacts.job import Job
from pipeline_lib.reporting.sweeps import make_sweep


def run(job: Job) -> None:
    """Collect the evaluate artifacts `00000`, `00001`, … into table.csv, in the order of `settings.rows`."""
    rows = job.settings["rows"]
    arms = [read_json(job.inputs[f"{index:05}"] / "result.json")["result"] for index in range(len(rows))]
    table = make_sweep(job.settings["columns"], rows, arms, job.settings.get("metrics"))
    write_bytes(job.out / "table.csv", table.csv().encode())
    result = {"axes": table.axes, "metrics": table.metrics, "points": len(table.points), "task": arms[0]["task"]}
    write_json(job.out / "sweep.json", {"result": result, "provenance": {}})
