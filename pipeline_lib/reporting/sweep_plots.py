"""Plots of sweeps: a heat map over two axes, curves over one, and a panel for each point of the axes beyond."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline_lib.reporting.numbers import label, number
from pipeline_lib.reporting.plots import INK, MAX_SERIES, SERIES, WIDTH, Picture, figure, picture, style
from pipeline_lib.reporting.sweeps import SweepTable, axis_name, point_name

PANELS_A_ROW = 2
WIDE = (
    20  # the colours and the axis of a metric are logarithmic when its largest value is over so many times the smallest
)


def sweep_pictures(table: SweepTable, metric: str, name: str) -> list[Picture]:
    """The heat map if there are two axes or more, then the curves if their colours suffice."""
    found = []
    if len(table.axes) >= 2:
        found.append(sweep_map(table, metric, f"{name}-map"))
    if len(_ordered(values[1] for values, _ in table.points if len(values) > 1)) <= MAX_SERIES:
        found.append(sweep_curve(table, metric, name))
    return found


def sweep_curve(table: SweepTable, metric: str, name: str) -> Picture:
    """A metric over the first axis, a curve for each value of the second, a panel for each point of the others.

    A point whose training diverged is a cross at the upper edge, whatever it scored, and no part of its curve.
    """
    panels = _panels(table)
    drawn, grid = _grid(len(panels), 4.2 if len(panels) == 1 else 3.4)
    ticks = _ordered(values[0] for values, _ in table.points)
    gone = _diverged(table)
    wide = _is_wide([metrics[metric].mean for values, metrics in table.points if _key(values) not in gone])
    for axes, (rest, points) in zip(grid, panels, strict=False):
        lines = _ordered(values[1] for values, _ in points) if len(table.axes) > 1 else [None]
        for index, line in enumerate(lines):
            own = [(v, m) for v, m in points if len(v) == 1 or _key(v[1]) == _key(line)]
            at = {_key(v[0]): m[metric] for v, m in own if _key(v) not in gone}
            crosses = {_key(v[0]) for v, _ in own if _key(v) in gone}
            x = [i for i, tick in enumerate(ticks) if _key(tick) in at]
            found = [at[_key(ticks[i])] for i in x]
            legend = point_name(table.axes[1:2], [line]) if len(table.axes) > 1 else None
            errors = [measured.stderr or 0.0 for measured in found]
            colour = SERIES[index % MAX_SERIES]
            axes.errorbar(
                x, [m.mean for m in found], errors, label=legend, color=colour, marker="o", markersize=4, capsize=3
            )
            _crosses(axes, [i for i, tick in enumerate(ticks) if _key(tick) in crosses], index, colour)
        axes.set_xticks(range(len(ticks)), [label(tick) for tick in ticks])
        if wide:
            axes.set_yscale("log")
        style(axes, axis_name(table.axes[0]), metric)
        _title(axes, table, rest)
    if len(table.axes) > 1:
        grid[0].legend(frameon=False, labelcolor=INK, fontsize=8)
    scale = ", logarithmic axis" if wide else ""
    marks = "; a cross is a training that diverged" if gone else ""
    return picture(drawn, name, f"{metric} over {_over(table, 1)}; whiskers are ± 1 standard error{scale}{marks}.")


def sweep_map(table: SweepTable, metric: str, name: str) -> Picture:
    """Heat maps of a metric over the first two axes, each cell with its number; one scale of colours for all panels."""
    from matplotlib.colors import LogNorm, Normalize

    panels = _panels(table)
    columns, rows = (_ordered(values[axis] for values, _ in table.points) for axis in (0, 1))
    gone = _diverged(table)
    means = [metrics[metric].mean for values, metrics in table.points if _key(values) not in gone]
    finite, wide = [value for value in means if math.isfinite(value)] or [1.0], _is_wide(means)
    low, high = min(finite), max(finite)
    scale = (LogNorm if wide else Normalize)(low, high if high > low else low + 1)
    drawn, grid = _grid(len(panels), max(2.4, 1.0 + 0.46 * len(rows)))
    colours = _map()
    for axes, (rest, points) in zip(grid, panels, strict=False):
        at = {
            (_key(values[0]), _key(values[1])): math.inf if _key(values) in gone else metrics[metric].mean
            for values, metrics in points
        }
        lost = {(_key(values[0]), _key(values[1])) for values, _ in points if _key(values) in gone}
        for i, column in enumerate(columns):
            for j, row in enumerate(rows):
                value = at.get((_key(column), _key(row)))
                if value is None:
                    continue
                share = float(scale(value)) if math.isfinite(value) else 1.0
                axes.add_patch(_rectangle(i, j, colours(share)))
                ink = "#ffffff" if share > 0.4 else "#141414"
                said = "diverged" if (_key(column), _key(row)) in lost else number(value, 3)
                axes.text(i, j, said, ha="center", va="center", fontsize=8, color=ink)
        axes.set_xlim(-0.5, len(columns) - 0.5)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xticks(range(len(columns)), [label(value) for value in columns])
        axes.set_yticks(range(len(rows)), [label(value) for value in rows])
        style(axes, axis_name(table.axes[0]), axis_name(table.axes[1]), grid="")
        _title(axes, table, rest)
    drawn.suptitle(metric, fontsize=11, color=INK, x=0.01, ha="left")
    colour = "logarithmic colours" if wide else "linear colours"
    return picture(drawn, name, f"{metric} over {_over(table, 2)}, {colour}.")


def _diverged(table: SweepTable) -> set[str]:
    """The points whose training diverged, by `_key` of their values."""
    marks = table.diverged or [False] * len(table.points)
    return {_key(values) for (values, _), mark in zip(table.points, marks, strict=True) if mark}


def _crosses(axes: Any, x: list[int], row: int, colour: str) -> None:
    """A cross for each diverged point, at the upper edge; those of each curve in a row of their own."""
    if not x:
        return
    height = 0.96 - 0.05 * row
    axes.plot(x, [height] * len(x), "x", color=colour, markersize=8, transform=axes.get_xaxis_transform())
    for at in x:
        place: Any = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "va": "center"}
        axes.annotate("diverged", (at, height), (8, 0), fontsize=8, color=INK, **place)


def _panels(table: SweepTable) -> list[tuple[list[Any], list[Any]]]:
    """(values of the axes beyond two, the points that have them), in order."""
    rest = _unique(values[2:] for values, _ in table.points)
    return [(own, [point for point in table.points if _key(point[0][2:]) == _key(own)]) for own in rest]


def _grid(panels: int, height: float) -> tuple[Any, list[Any]]:
    """A figure and its axes, one a panel; `height` in inches of one row of panels."""
    columns = min(panels, PANELS_A_ROW)
    rows = -(-panels // columns)
    drawn, axes = figure(WIDTH, height * rows + (0.2 if panels > 1 else 0), rows, columns)
    found = [axes] if panels == 1 else list(axes.flat)
    for unused in found[panels:]:
        unused.set_visible(False)
    return drawn, found


def _title(axes: Any, table: SweepTable, rest: Sequence[Any]) -> None:
    if rest:
        axes.set_title(point_name(table.axes[2:], rest), fontsize=9, color=INK, loc="left")


def _over(table: SweepTable, first: int) -> str:
    """`a and b, a panel for each c and d`."""
    names = [axis_name(axis) for axis in table.axes]
    text = " and ".join(names[:first])
    if first == 1 and len(names) > 1:
        text += f", a curve for each {names[1]}"
    return f"{text}, a panel for each {' and '.join(names[2:])}" if len(names) > 2 else text


def _is_wide(values: Sequence[float]) -> bool:
    finite = [value for value in values if math.isfinite(value)]
    return bool(finite) and min(finite) > 0 and max(finite) > WIDE * min(finite)


def _rectangle(x: float, y: float, colour: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, facecolor=colour, edgecolor="none")


def _map() -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("errata", ["#dfe8f7", "#7ea3de", "#3565c4", "#3a2a78", "#2a0d3a"])


def _key(value: Any) -> str:
    return repr(value)


def _unique(values: Any) -> list[Any]:
    found: Mapping[str, Any] = {_key(value): value for value in values}
    return list(found.values())


def _ordered(values: Any) -> list[Any]:
    """Each value once: numbers by size, anything else as it came."""
    found = _unique(values)
    numeric = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in found)
    return sorted(found) if numeric else found
