"""Arms compared with a baseline: means with intervals, differences seed by seed, verdicts, power, and the work done."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline_lib.config.errors import UserError
from pipeline_lib.reporting.numbers import arm_of, metric_of, number, plus_minus
from pipeline_lib.reporting.tables import to_csv
from pipeline_lib.reporting.verdicts import (
    Verdict,
    detectable,
    interval,
    pooled,
    power_of_difference,
    power_of_equality,
    verdict,
)

WORK = (
    "steps", "sequences.train", "layer_passes.train", "sequences.forward", "sequences.forward.free",
    "sequences.hessian", "sequences.hessian.free", "flops", "rst_hours", "epochs",
)  # fmt: skip
"""Of the figures of a training's work those that people read."""


@dataclass(frozen=True)
class Cell:
    """An arm in a column, by one measure.

    Attributes:
        values: one a seed.
        against: its verdict; None for the baseline.
        work: figures of its trainings, means over seeds.
    """

    column: str
    arm: str
    task: str
    metric: str
    delta: float
    values: list[float]
    against: Verdict | None
    work: dict[str, float]

    def mean(self) -> str:
        """Mean ± standard error over seeds, as people read it."""
        mean, low, _ = interval(self.values)
        return plus_minus(mean, None if math.isnan(low) else _error(self.values))


@dataclass(frozen=True)
class Comparison:
    """All cells, columns first, then measures, then arms."""

    seeds: list[int]
    level: float
    cells: list[Cell]

    def groups(self) -> dict[tuple[str, str], dict[str, list[Cell]]]:
        """{(task, metric): {column: cells of its arms}}."""
        found: dict[tuple[str, str], dict[str, list[Cell]]] = {}
        for cell in self.cells:
            found.setdefault((cell.task, cell.metric), {}).setdefault(cell.column, []).append(cell)
        return found

    def spread(self, column: str, cell: Cell) -> float:
        """Standard deviation of the paired differences, pooled over the arms of a column and measure."""
        same = [
            other
            for other in self.cells
            if (other.column, other.task, other.metric) == (column, cell.task, cell.metric)
        ]
        return pooled([other.against.deviation for other in same if other.against])

    def csv(self) -> str:
        """One line a cell; floats by their shortest exact digits, nothing where there is no number."""
        works = sorted({name for cell in self.cells for name in cell.work})
        heads = ["column", "arm", "task", "metric", "n", "mean", "low", "high", "difference", "difference_low"]
        heads += ["difference_high", "delta", "verdict", "power_of_delta", "power_of_equality", "detectable"]
        lines: list[list[Any]] = [[*heads, *(f"seed_{seed}" for seed in self.seeds), *works]]
        for cell in self.cells:
            n, found, spread = len(cell.values), cell.against, self.spread(cell.column, cell)
            judged: list[Any] = [None, None, None, cell.delta, "baseline"]
            if found:
                judged = [found.difference, found.low, found.high, cell.delta, found.word]
            power = [
                of(size, spread, n, *given) if math.isfinite(spread) else None
                for of, size, given in (
                    (power_of_difference, cell.delta, (self.level,)),
                    (power_of_equality, cell.delta, (self.level,)),
                )
            ]
            smallest = detectable(spread, n, level=self.level) if math.isfinite(spread) else None
            head = [cell.column, cell.arm, cell.task, cell.metric, n, *interval(cell.values, self.level)]
            line = [*head, *judged, *power, smallest, *cell.values, *(cell.work.get(name) for name in works)]
            lines.append([None if isinstance(value, float) and math.isnan(value) else value for value in line])
        return to_csv(lines)

    def markdown(self) -> str:
        """A table for every measure and column: mean, difference with its interval, verdict; and what δ it can see."""
        return "\n".join(
            f"## {task}: {metric}, {column}\n\n{arms_table(cells, self.level)}\n{self.power(cells)}\n"
            for (task, metric), columns in self.groups().items()
            for column, cells in columns.items()
        )

    def power(self, cells: Sequence[Cell]) -> str:
        """A sentence on what could have been seen among the arms of one column and measure."""
        cell, n = cells[0], len(self.seeds)
        spread = self.spread(cell.column, cell)
        if not math.isfinite(spread):
            return "Power is not known: no arm has finite values."
        sees, same = (
            of(cell.delta, spread, n, self.level) for of in (power_of_difference, power_of_equality)
        )  # fmt: skip
        return (
            f"δ = {number(cell.delta)}; {n} seeds; paired differences have a standard deviation of {number(spread, 3)} "
            f"(pooled). A true difference of δ is seen with power {sees:.0%}, arms without one are found equal with "
            f"power {same:.0%}; power 80 % needs a difference of {number(detectable(spread, n, level=self.level), 3)}."
        )


def arms_table(cells: Sequence[Cell], level: float) -> str:
    """Markdown: a row an arm."""
    lines = [f"| arm | mean | difference | {1 - level:.0%} interval | verdict |", "| --- | ---: | ---: | ---: | --- |"]
    for cell in cells:
        found = cell.against
        judged = ["", "", "baseline"]
        if found:
            judged = [number(found.difference, 3), f"{number(found.low, 3)} … {number(found.high, 3)}", found.word]
        lines.append("| " + " | ".join([cell.arm.replace("|", "\\|"), cell.mean(), *judged]) + " |")
    return "\n".join(lines) + "\n"


def measured(
    settings: Mapping[str, Any], results: Mapping[str, dict[str, Any]], trainings: Mapping[str, dict[str, Any]]
) -> tuple[dict[str, list[float]], list[bool], dict[str, dict[str, float]]]:
    """What `judge` needs, as plain numbers.

    Args:
        settings: arms (the first is the baseline), columns, seeds, measures, level.
        results: "<column>.<arm>.<seed>.<measure>" → `result` of its result.json.
        trainings: "<column>.<arm>.<seed>" → `result` of its train.json; none where nothing was trained.

    Raises:
        UserError: a task has no such metric, or does not say whether more of it is better, or its conditions differ.
    """
    seeds = range(len(settings["seeds"]))
    values: dict[str, list[float]] = {}
    work: dict[str, dict[str, float]] = {}
    higher = []
    for m, measure in enumerate(settings["measures"]):
        for c, column in enumerate(settings["columns"]):
            for a, arm in enumerate(settings["arms"]):
                found = [arm_of(results[f"{c}.{a}.{s}.{m}"]) for s in seeds]
                where = f"{column}, {arm}, task {measure['task']}"
                values[f"{c}.{a}.{m}"] = [metric_of(one, measure["metric"], where).mean for one in found]
                work[f"{c}.{a}"] = _work([trainings.get(f"{c}.{a}.{s}") for s in seeds])
        first = arm_of(results[f"0.0.0.{m}"])
        higher.append(_higher(first, measure["metric"], f"task {measure['task']}"))
    _alike(settings, results)
    return values, higher, work


def judge(
    settings: Mapping[str, Any],
    values: Mapping[str, Sequence[float]],
    higher: Sequence[bool],
    work: Mapping[str, dict[str, float]],
) -> Comparison:
    """Compare arms by their numbers.

    Args:
        settings: see `measured`.
        values: "<column>.<arm>.<measure>" → one value a seed.
        higher: of each measure, whether more is better.
        work: "<column>.<arm>" → figures of its trainings.
    """
    cells = []
    for c, column in enumerate(settings["columns"]):
        for m, measure in enumerate(settings["measures"]):
            baseline = list(values[f"{c}.0.{m}"])
            for a, arm in enumerate(settings["arms"]):
                own, delta = list(values[f"{c}.{a}.{m}"]), measure["delta"]
                against = verdict(own, baseline, delta, higher[m], settings["level"]) if a else None
                cells.append(
                    Cell(column, arm, measure["task"], measure["metric"], delta, own, against, work[f"{c}.{a}"])
                )
    return Comparison(list(settings["seeds"]), settings["level"], cells)


def _higher(arm: dict[str, Any], metric: str, where: str) -> bool:
    said = [names[metric] for names in arm["conditions"].get("higher_is_better", {}).values() if metric in names]
    if not said:
        raise UserError(
            "the task does not say whether more of this metric is better", where=where, value=metric,
            fix="compare by another metric",
        )  # fmt: skip
    return bool(said[0])


def _alike(settings: Mapping[str, Any], results: Mapping[str, dict[str, Any]]) -> None:
    """Cells of a column and measure must have been scored alike.

    Raises:
        UserError: they were not.
    """
    for c, column in enumerate(settings["columns"]):
        for m, measure in enumerate(settings["measures"]):
            found = [
                (arm, arm_of(results[f"{c}.{a}.{s}.{m}"]))
                for a, arm in enumerate(settings["arms"])
                for s in range(len(settings["seeds"]))
            ]
            first = found[0][1]
            for arm, one in found:
                if any(one[key] != first[key] for key in ("task", "conditions")):
                    raise UserError(
                        "these arms cannot be compared: they were not scored on the same examples",
                        where=f"{column}, task {measure['task']}",
                        value=arm,
                        fix="give them the same tokenizer, dataset and task",
                    )


def _work(trainings: Sequence[dict[str, Any] | None]) -> dict[str, float]:
    """Numbers that trainings left, means over seeds; of the table of passes, sequences and layers passed by kind."""
    flat = [_numbers(training) for training in trainings if training]
    names = sorted({name for one in flat for name in one})
    return {name: sum(one.get(name, 0.0) for one in flat) / len(flat) for name in names}


def _numbers(training: Mapping[str, Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    for key, value in training.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            found[key] = float(value)
    for row in training.get("work", []):
        for name, size in (("sequences", 1), ("layer_passes", row["layers"])):
            key = f"{name}.{row['kind']}" + ("" if row["charged"] else ".free")
            found[key] = found.get(key, 0.0) + size * row["sequences"]
    return found


def _error(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))
