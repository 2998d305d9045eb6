"""Plots as SVG and PNG: training curves and metrics of experiments; what all plots share."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline_lib.reporting.numbers import Measured

# Colours are named by the CSS variables that take their place where a plot stands in a page (light and dark).
INK, MUTED, GRID = "#1f2430", "#667085", "#e3e6ec"
SERIES = ("#3565c4", "#d0662b", "#2d8f6f", "#9354b8", "#b8860b", "#c2456a", "#4b7f9e", "#6f7d3c")
VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--rule", **{c: f"--series-{i + 1}" for i, c in enumerate(SERIES)}}
MAX_SERIES = len(SERIES)
WIDTH = 10.0  # inches, for every plot, so that a page scales their text alike


@dataclass(frozen=True)
class Picture:
    """A plot.

    Attributes:
        name: of its files, without an ending.
        caption: one sentence.
        svg, png: as files, on their own.
        inline: the SVG element for a page that defines the CSS variables of `VARIABLES`.
    """

    name: str
    caption: str
    svg: str
    png: bytes
    inline: str


def training_curves(
    curves: Mapping[str, Sequence[tuple[float, float]]], unit: str, what: str = "training loss"
) -> Picture:
    """Loss over `unit` (tokens or steps); curves: experiment → [(x, loss in nats per token)]."""
    drawn, axes = figure(WIDTH, 4.2)
    draw_curves(axes, curves, unit, what)
    axes.legend(frameon=False, labelcolor=INK, fontsize=9, ncols=1 + len(curves) // 6)
    return picture(drawn, what.replace(" ", "-"), f"{what.capitalize()} over {unit}.")


def draw_curves(axes: Any, curves: Mapping[str, Sequence[tuple[float, float]]], unit: str, what: str) -> None:
    """Lines, each with the colour and dashes of its place; a name without points keeps its place for others."""
    for index, (name, points) in enumerate(curves.items()):
        if points:
            x, y = zip(*points, strict=True)
            axes.plot(x, y, label=name, color=SERIES[index % MAX_SERIES], linewidth=1.6, linestyle=_dash(index))
    style(axes, unit, f"{what} (nats per token)")
    axes.xaxis.set_major_formatter(_engineering())


def metric_bars(metric: str, arms: Mapping[str, Mapping[str, Measured]], name: str) -> Picture:
    """One group of bars an experiment, a bar an arm (clean, transformed), with standard errors.

    The axis is logarithmic when the largest value is over 20 times the smallest.
    """
    drawn, axes = figure(WIDTH, 1.0 + 0.62 * len(arms))
    values = [m.mean for group in arms.values() for m in group.values() if math.isfinite(m.mean)]
    log = bool(values) and min(values) > 0 and max(values) > 20 * min(values)
    start = min(values) / 2 if log else 0.0
    for row, group in enumerate(arms.values()):
        for place, (arm, measured) in enumerate(sorted(group.items())):
            _bar(axes, row + (place - (len(group) - 1) / 2) * 0.36, arm, measured, start, max(values, default=1.0))
    axes.set_yticks(range(len(arms)), list(arms))
    axes.invert_yaxis()
    if log:
        axes.set_xscale("log")
        axes.set_xlim(left=start)
    axes.margins(x=0.16)
    style(axes, metric, "", grid="x")
    handles = [_patch(SERIES[i], arm) for i, arm in enumerate(("clean", "transformed"))]
    place = {"loc": "lower right", "bbox_to_anchor": (1, 1), "ncols": 2}
    axes.legend(handles=handles, frameon=False, labelcolor=INK, fontsize=9, **place)
    scale = ", logarithmic axis" if log else ""
    what = f"{metric} with and without the transform of each experiment"
    return picture(drawn, name, f"{what}; whiskers are ± 1 standard error{scale}.")


def figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    """A figure of that size in inches, drawn without a display, and its axes: an array of them if there are several."""
    import matplotlib

    style: Any = {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10, "text.parse_math": False}
    matplotlib.rcParams.update(style)
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    return made, made.subplots(rows, columns)


def picture(drawn: Any, name: str, caption: str) -> Picture:
    """A drawn figure as files and as part of a page."""
    import matplotlib

    svg, png = io.StringIO(), io.BytesIO()
    # The salt names clip paths and markers: another one for each plot, for they share one page.
    with matplotlib.rc_context({"svg.hashsalt": name}):
        drawn.savefig(svg, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    drawn.savefig(png, format="png", dpi=160, facecolor="white", metadata={"Software": None})
    text = re.sub(r"[ \t]+$", "", svg.getvalue(), flags=re.M)
    return Picture(name, caption, text, png.getvalue(), _inline(text, caption))


def _inline(svg: str, caption: str) -> str:
    """The <svg> element alone, its colours as CSS variables, its size left to the page."""
    element = svg[svg.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.S)
    for colour, variable in VARIABLES.items():
        element = element.replace(colour, f"var({variable})")
    element = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", element, count=1)
    element = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", element, count=1)
    element = re.sub(r"font: ([0-9.]+px) [^;\"]*", r"font-size: \1; font-family: inherit", element)
    return element.replace("<svg", f'<svg role="img" aria-label="{_escaped(caption)}"', 1)


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")


def style(axes: Any, x: str, y: str, grid: str = "both") -> None:
    """Labels, ticks, spines and grid (both, x, or none) as everywhere."""
    axes.set_xlabel(x, color=MUTED)
    axes.set_ylabel(y, color=MUTED)
    axes.tick_params(colors=MUTED, labelcolor=INK, length=3)
    axes.tick_params(which="minor", length=0)
    axes.set_axisbelow(True)
    if grid:
        axes.grid(axis=grid, color=GRID, linewidth=0.8)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom" if grid else False)
        spine.set_color(MUTED)


def _bar(axes: Any, y: float, arm: str, measured: Measured, start: float, largest: float) -> None:
    colour = SERIES[0] if arm == "clean" else SERIES[1]
    finite = math.isfinite(measured.mean)
    value = measured.mean if finite else largest
    axes.barh(y, value - start, left=start, height=0.32, color=colour, alpha=1.0 if finite else 0.35)
    error = measured.stderr if finite and measured.stderr else 0.0
    if error:
        lower = min(error, value - start) if start > 0 else error  # a logarithmic axis has no room below its start
        axes.errorbar(value, y, xerr=[[lower], [error]], color=INK, capsize=3, linewidth=1.2)
    axes.annotate(
        str(measured), (value + error, y), (6, 0), textcoords="offset points", va="center", fontsize=8.5, color=INK
    )


def _patch(colour: str, label: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(color=colour, label=label)


def _engineering() -> Any:
    from matplotlib.ticker import EngFormatter

    return EngFormatter(sep=" ")


def _dash(index: int) -> Any:
    return ("-", (0, (4, 1.5)), (0, (1, 1.2)))[index // MAX_SERIES % 3]
