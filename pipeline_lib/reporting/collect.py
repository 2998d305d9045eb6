"""What the report shows, read from artifacts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline_lib.artifacts.files import read_json
from pipeline_lib.artifacts.store import SEAL, read_seal
from pipeline_lib.reporting.budget_curves import Curve
from pipeline_lib.reporting.comparison import Comparison, judge
from pipeline_lib.reporting.numbers import Measured, arm_of
from pipeline_lib.reporting.sweeps import SweepTable, read_sweep
from pipeline_lib.reporting.tables import Grid, read_grid


@dataclass(frozen=True)
class Result:
    """One readable result: an experiment at a task."""

    experiment: str
    task: str
    result: dict[str, Any]
    provenance: dict[str, Any]
    fingerprint: str
    chain: list[str]

    @property
    def arms(self) -> dict[str, dict[str, Any]]:
        """`clean`, and `transformed` if there is one."""
        return {name: self.result[name] for name in ("clean", "transformed") if name in self.result}

    def metrics(self) -> list[str]:
        """Names of the metrics."""
        return sorted(arm_of(self.result)["metrics"])

    def measured(self, metric: str) -> dict[str, Measured]:
        """{arm: the metric}."""
        return {name: Measured.of(arm["metrics"][metric]) for name, arm in self.arms.items()}

    def lower_is_better(self, metric: str) -> bool | None:
        """Whether the task says so; None when it says nothing."""
        directions = arm_of(self.result).get("conditions", {}).get("higher_is_better", {})
        for task in directions.values():
            if metric in task:
                return not task[metric]
        return None


@dataclass(frozen=True)
class Training:
    """One training run: its settings, its outcome, and (tokens or step, loss) of its log."""

    experiment: str
    artifact: str
    settings: dict[str, Any]
    result: dict[str, Any]
    curve: list[tuple[float, float]]
    unit: str
    fingerprint: str


@dataclass(frozen=True)
class Compared:
    """A comparison of arms: its verdicts, {column: {arm: loss over what was spent}}, and {arm or task: switches}."""

    made: Comparison
    curves: dict[str, dict[str, Curve]]
    ran: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Collected:
    """All that the report shows."""

    title: str
    results: list[Result]
    trainings: dict[str, Training]
    sweeps: dict[str, SweepTable]
    grids: dict[str, Grid]
    transforms: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    comparisons: dict[str, Compared] = field(default_factory=dict)

    @property
    def favourites(self) -> list[str]:
        """The metrics of the tables: where one metric is plotted, one of these if there is a choice."""
        return [grid.metric for grid in self.grids.values()]

    @property
    def experiments(self) -> list[str]:
        """In the order of config.yaml."""
        return list(dict.fromkeys([*(result.experiment for result in self.results), *self.trainings]))

    def behind(self, experiment: str) -> set[str]:
        """The artifacts that an experiment's results were made from."""
        return {line for result in self.results if result.experiment == experiment for line in result.chain}

    def tasks(self) -> dict[str, list[Result]]:
        """Results by task."""
        found: dict[str, list[Result]] = {}
        for result in self.results:
            found.setdefault(result.task, []).append(result)
        return found


def collect(settings: Mapping[str, Any], inputs: Mapping[str, Path]) -> Collected:
    """Read what a report needs.

    Args:
        settings: {title, …}.
        inputs: `result:<experiment>:<task>`, `train:<experiment>`, `sweep:<name>`, `table:<name>`,
            `comparison:<name>` → artifact.
    """
    results, trainings, sweeps, grids, comparisons = [], {}, {}, {}, {}
    for role, path in inputs.items():
        kind, _, name = role.partition(":")
        if kind == "result":
            results.append(_result(name, path))
        elif kind == "train":
            trainings[name] = _training(name, path)
        elif kind == "sweep":
            metric = read_json(path / "sweep.json")["result"].get("metric")
            sweeps[name] = read_sweep((path / "table.csv").read_text(encoding="utf-8"), metric)
        elif kind == "table":
            grids[name] = read_grid((path / "table.csv").read_text(encoding="utf-8"))
        elif kind == "comparison":
            comparisons[name] = _compared(path)
    transforms = {result.experiment: arm_of(result.result)["transform"] for result in results}
    return Collected(settings["title"], results, trainings, sweeps, grids, transforms, comparisons)


def _compared(path: Path) -> Compared:
    found = read_json(path / "comparison.json")["result"]
    values = {cell: [float(value) for value in own] for cell, own in found["values"].items()}
    return Compared(judge(found["settings"], values, found["higher"], found["work"]), found["curves"], found["ran"])


def _result(name: str, path: Path) -> Result:
    experiment, _, task = name.rpartition(":")
    value = read_json(path / "result.json")
    return Result(experiment, task, value["result"], value.get("provenance", {}), _fingerprint(path), _chain(path))


def _training(name: str, path: Path) -> Training:
    log = path / "log" / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
    unit = "tokens" if lines and all("tokens" in line for line in lines) else "steps"
    key = "tokens" if unit == "tokens" else "step"
    curve = [(line[key], line["loss"]) for line in lines if line.get("loss") is not None]
    settings = read_seal(path)["spec"]["settings"] if (path / SEAL).exists() else {}
    own = f"{path.parent.name}/{path.name}"
    result = read_json(path / "train.json")["result"]
    return Training(name, own, settings, result, curve, unit, _fingerprint(path))


def _fingerprint(path: Path) -> str:
    return read_seal(path)["spec"]["fingerprint"] if (path / SEAL).exists() else ""


def _chain(path: Path) -> list[str]:
    """The artifacts behind `path`, depth first, each once: `stage/name`, as far as they are still in the store."""
    if not (path / SEAL).exists():
        return []
    found = [f"{path.parent.name}/{path.name}"]
    for entry in read_seal(path)["spec"]["inputs"].values():
        for line in _chain(path.parent.parent / entry["stage"] / entry["id"]):
            if line not in found:
                found.append(line)
    return found
