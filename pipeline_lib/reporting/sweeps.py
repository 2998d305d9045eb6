"""Sweeps: from evaluated points to one CSV, and back for plots."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline_lib.config.errors import UserError, closest
from pipeline_lib.reporting.numbers import Measured, label, main_metric
from pipeline_lib.reporting.tables import to_csv

DIVERGED = "diverged"  # a column


@dataclass(frozen=True)
class SweepTable:
    """A sweep.

    Attributes:
        points: of each, the values of `axes` (JSON values) and the metrics.
        metric: the one that pictures show, if it was chosen.
        diverged: of each point whether its training diverged; None where that ends in an error.
    """

    axes: list[str]
    metrics: list[str]
    points: list[tuple[list[Any], dict[str, Measured]]]
    metric: str | None = None
    diverged: list[bool] | None = None

    def main_metric(self, favourites: Sequence[str] = ()) -> str:
        """The metric that pictures show: the chosen one, else one of `favourites`, else the usual one."""
        return self.metric or main_metric(self.metrics, favourites)

    def csv(self) -> str:
        """Axis columns, then `<metric>`, `<metric>_stderr`, `<metric>_n` for each metric, then `diverged` if known."""
        header = [*self.axes, *(f"{name}{end}" for name in self.metrics for end in ("", "_stderr", "_n"))]
        marks = [[]] * len(self.points) if self.diverged is None else [[json.dumps(mark)] for mark in self.diverged]
        lines: list[list[Any]] = [header if self.diverged is None else [*header, DIVERGED]]
        for (values, metrics), mark in zip(self.points, marks, strict=True):
            figures = [
                part for name in self.metrics for part in (metrics[name].mean, metrics[name].stderr, metrics[name].n)
            ]
            lines.append([*map(_plain, values), *figures, *mark])
        return to_csv(lines)


def make_sweep(
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    arms: Sequence[dict[str, Any]],
    metrics: Sequence[str] | None = None,
    metric: str | None = None,
    diverged: list[bool] | None = None,
) -> SweepTable:
    """The table of a sweep.

    Args:
        columns: the settings that vary.
        rows: their values, one list a point.
        arms: `result` of each point's evaluation.
        metrics: the metrics to keep; None = all.
        metric: the one that pictures show; None = the usual one.
        diverged: see `SweepTable`.

    Raises:
        UserError: the points are of different tasks, or have no such metric.
    """
    known = sorted(arms[0]["metrics"])
    chosen = list(metrics) if metrics is not None else known
    for name in [*chosen, *([metric] if metric else [])]:
        if name not in known:
            raise UserError("the task has no such metric", value=name, allowed=known, fix=closest(name, known))
    for arm in arms:
        if arm["task"] != arms[0]["task"] or sorted(arm["metrics"]) != known:
            raise UserError("the points of a sweep are of different tasks", value=[arms[0]["task"], arm["task"]])
    points = [
        (list(values), {name: _over_seeds(arm["metrics"][name]) for name in chosen})
        for values, arm in zip(rows, arms, strict=True)
    ]
    return SweepTable(list(columns), chosen, points, metric, diverged)


def read_sweep(text: str, metric: str | None = None) -> SweepTable:
    """The sweep in a CSV that `SweepTable.csv` wrote, and the metric its pictures show, if one was chosen."""
    header, *lines = list(csv.reader(io.StringIO(text)))
    known = set(header)
    metrics = [name for name in header if {f"{name}_stderr", f"{name}_n"} <= known]
    axes = header[: header.index(metrics[0])]
    points = []
    for line in lines:
        cell = dict(zip(header, line, strict=True))
        figures = {
            name: Measured(
                float(cell[name]), float(error) if (error := cell[f"{name}_stderr"]) else None, int(cell[f"{name}_n"])
            )
            for name in metrics
        }
        points.append(([_value(cell[axis]) for axis in axes], figures))
    diverged = [line[-1] == "true" for line in lines] if header[-1] == DIVERGED else None
    return SweepTable(axes, metrics, points, metric, diverged)


def point_name(axes: Sequence[str], values: Sequence[Any]) -> str:
    """What tells a point from the others, in words: `p_frac = 2⁻¹⁰, operand = weights`."""
    return ", ".join(f"{axis_name(axis)} = {label(value)}" for axis, value in zip(axes, values, strict=True))


def axis_name(axis: str) -> str:
    """A setting's name as people read it."""
    return axis.removeprefix("transform.")


def _over_seeds(figures: dict[str, Any]) -> Measured:
    return Measured.of({**figures, "sampling_stderr": None})


def _plain(value: Any) -> Any:
    return value if isinstance(value, (float, str)) and not _reads_as_json(value) else json.dumps(value, sort_keys=True)


def _reads_as_json(value: Any) -> bool:
    """Whether a string would be taken for a number, list or null when it is read back."""
    return isinstance(value, str) and not isinstance(_value(value), str)


def _value(text: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return text if isinstance(value, float) and not math.isfinite(value) else value
