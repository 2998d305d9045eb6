"""sweep: the points of a grid, collected into one CSV."""

from __future__ import annotations

from pipeline_lib.artifacts.files import read_json, write_bytes, write_json
from pipeline_lib.artifacts.job import Job
from pipeline_lib.evaluation.records import write_readable
from pipeline_lib.reporting.sweep_plots import sweep_pictures
from pipeline_lib.reporting.sweeps import make_sweep, point_name


def run(job: Job) -> None:
    """Collect the evaluate artifacts `00000`, `00001`, … into table.csv, in the order of `settings.rows`.

    Trainings `train-00000`, … say whether a point diverged. Beside it lie its picture, table.svg and table.png, and
    the readable files of a task whose runs leave records.
    """
    rows = job.settings["rows"]
    arms = [read_json(job.inputs[f"{index:05}"] / "result.json")["result"] for index in range(len(rows))]
    chosen = job.settings.get("metrics"), job.settings.get("metric")
    table = make_sweep(job.settings["columns"], rows, arms, *chosen, diverged=_diverged(job, len(rows)))
    write_bytes(job.out / "table.csv", table.csv().encode())
    for picture in sweep_pictures(table, table.main_metric(), "table")[:1]:
        write_bytes(job.out / "table.svg", picture.svg.encode())
        write_bytes(job.out / "table.png", picture.png)
    clean = {"clean": job.inputs["clean"]} if "clean" in job.inputs else {}
    points = {point_name(table.axes, values): job.inputs[f"{index:05}"] for index, values in enumerate(rows)}
    write_readable(job.out, "table", arms[0]["task"], {**clean, **points})
    result = {"axes": table.axes, "metrics": table.metrics, "points": len(table.points), "task": arms[0]["task"]}
    if table.metric is not None:
        result["metric"] = table.metric
    write_json(job.out / "sweep.json", {"result": result, "provenance": {}})


def _diverged(job: Job, points: int) -> list[bool] | None:
    """Of each point whether its training diverged; None for a sweep whose trainings would have ended in an error."""
    trained = [job.inputs.get(f"train-{index:05}") for index in range(points)]
    if not any(trained):
        return None
    return [path is not None and bool(read_json(path / "train.json")["result"]["diverged"]) for path in trained]
