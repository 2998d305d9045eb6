"""table: experiments in rows and columns, or arms compared with a baseline, as CSV and Markdown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline_lib.artifacts.files import read_json, write_bytes, write_json
from pipeline_lib.artifacts.job import Job
from pipeline_lib.artifacts.store import SEAL, read_seal
from pipeline_lib.evaluation.statistics import encode_all
from pipeline_lib.reporting import switches
from pipeline_lib.reporting.budget_curves import Curve, curve, panels, unit_of
from pipeline_lib.reporting.comparison import judge, measured
from pipeline_lib.reporting.numbers import arm_of
from pipeline_lib.reporting.tables import make_grid


def run(job: Job) -> None:
    """Write table.csv and table.md from the result artifacts in `job.inputs`, by experiment or by cell.

    Of a comparison also comparison.json, all that its verdicts and curves are made from, and table.svg: loss over what
    was spent, a panel for each column.
    """
    if "arms" in job.settings:
        made = _compared(job)
    else:
        made = make_grid(
            job.settings, {name: read_json(path / "result.json")["result"] for name, path in job.inputs.items()}
        )
    write_bytes(job.out / "table.csv", made.csv().encode())
    write_bytes(job.out / "table.md", made.markdown().encode())


def _compared(job: Job) -> Any:
    results, trainings = _by_kind(job, "result"), _by_kind(job, "train")
    read = {name: read_json(path / "result.json")["result"] for name, path in results.items()}
    trained = {name: read_json(path / "train.json")["result"] for name, path in trainings.items()}
    values, higher, work = measured(job.settings, read, trained)
    curves = _curves(job.settings, trainings) if trainings else {}
    if curves:
        drawn = panels(curves, unit_of(work.values()), f"comparison-{job.label}")
        write_bytes(job.out / "table.svg", drawn.svg.encode())
    ran = {arm: _switches(trainings.get(f"0.{n}.0")) for n, arm in enumerate(job.settings["arms"])}
    for number, measure in enumerate(job.settings["measures"]):
        ran[f"task {measure['task']}"] = switches.of_task(arm_of(read[f"0.0.0.{number}"])["task"])
    found = {"settings": job.settings, "values": values, "higher": higher, "work": work, "curves": curves, "ran": ran}
    write_json(job.out / "comparison.json", {"result": encode_all(json.loads(json.dumps(found)))})
    return judge(job.settings, values, higher, work)


def _by_kind(job: Job, kind: str) -> dict[str, Path]:
    """{cell: artifact} of the inputs named `<kind>:<cell>`."""
    return {role.partition(":")[2]: path for role, path in job.inputs.items() if role.startswith(f"{kind}:")}


def _curves(settings: dict[str, Any], trainings: dict[str, Path]) -> dict[str, dict[str, Curve]]:
    """{column: {arm: points}}."""
    found: dict[str, dict[str, Curve]] = {}
    for c, column in enumerate(settings["columns"]):
        for a, arm in enumerate(settings["arms"]):
            paths = [trainings[f"{c}.{a}.{s}"] / "log" / "metrics.jsonl" for s in range(len(settings["seeds"]))]
            logs = [[json.loads(line) for line in path.read_text().splitlines()] for path in paths]
            found.setdefault(column, {})[arm] = curve(logs)
    return found


def _switches(training: Path | None) -> dict[str, Any]:
    if training is None or not (training / SEAL).exists():
        return {}
    return switches.of_recipe(read_seal(training)["spec"]["settings"]["recipe"])
