"""Tables of experiments in rows and columns (a 2×2, for example), as Markdown and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline_lib.config.errors import UserError
from pipeline_lib.reporting.numbers import Measured, arm_of, metric_of


@dataclass(frozen=True)
class Grid:
    """A table: `cells[row][column]` is (experiment, its metric)."""

    metric: str
    rows: list[str]
    columns: list[str]
    cells: list[list[tuple[str, Measured]]]

    def markdown(self) -> str:
        """A Markdown table: mean ± standard error, and n where it is more than one."""
        lines = [_line([self.metric, *self.columns]), _line(["---", *["---:"] * len(self.columns)])]
        for heading, cells in zip(self.rows, self.cells, strict=True):
            lines.append(_line([heading, *(_shown(measured) for _, measured in cells)]))
        return "\n".join(lines) + "\n"

    def csv(self) -> str:
        """One line a cell: row, column, experiment, metric, mean, stderr, n."""
        lines: list[list[Any]] = [["row", "column", "experiment", "metric", "mean", "stderr", "n"]]
        for heading, cells in zip(self.rows, self.cells, strict=True):
            for column, (experiment, measured) in zip(self.columns, cells, strict=True):
                stderr = None if measured.sampling else measured.stderr
                lines.append([heading, column, experiment, self.metric, measured.mean, stderr, measured.n])
        return to_csv(lines)


def make_grid(settings: Mapping[str, Any], results: Mapping[str, dict[str, Any]]) -> Grid:
    """The table that `settings` (metric, rows, columns, cells) describes.

    Args:
        results: experiment → `result` of its result.json. An experiment stands for its transformed arm if it has one.

    Raises:
        UserError: a metric that a task has not, or cells of different tasks.
    """
    cells, tasks = [], {}
    for names in settings["cells"]:
        row = []
        for name in names:
            arm = arm_of(results[name])
            tasks[name] = arm["task"]
            row.append((name, metric_of(arm, settings["metric"], f"tables: {name}")))
        cells.append(row)
    if any(task != next(iter(tasks.values())) for task in tasks.values()):
        raise UserError("the cells of a table are results of different tasks", where="tables", value=tasks)
    return Grid(settings["metric"], list(settings["rows"]), list(settings["columns"]), cells)


def read_grid(text: str) -> Grid:
    """The table in a CSV that `Grid.csv` wrote."""
    lines = list(csv.DictReader(io.StringIO(text)))
    rows = list(dict.fromkeys(line["row"] for line in lines))
    columns = list(dict.fromkeys(line["column"] for line in lines))
    found = {
        (line["row"], line["column"]): (
            line["experiment"],
            Measured(float(line["mean"]), float(line["stderr"]) if line["stderr"] else None, int(line["n"])),
        )
        for line in lines
    }
    return Grid(lines[0]["metric"], rows, columns, [[found[row, column] for column in columns] for row in rows])


def to_csv(lines: Sequence[Sequence[Any]]) -> str:
    """CSV text, the same for the same values: floats by their shortest exact digits, None empty."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    for line in lines:
        writer.writerow(["" if value is None else repr(value) if isinstance(value, float) else value for value in line])
    return out.getvalue()


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _shown(measured: Measured) -> str:
    return f"{measured} (n={measured.n})" if measured.n > 1 else str(measured)
