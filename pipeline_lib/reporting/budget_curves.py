"""Loss over what was spent of a budget, from the logs of trainings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipeline_lib.reporting import plots
from pipeline_lib.reporting.plots import INK, WIDTH, Picture, draw_curves, figure, training_curves

Curve = list[tuple[float, float]]
"""(spent, loss) of each measurement."""
ACROSS = 3
"""Panels in a row."""


def curve(logs: Sequence[Sequence[Mapping[str, Any]]]) -> Curve:
    """(spent, loss) of the k-th measurement, means over trainings that differ in their seed alone.

    Spent is in the budget's unit, or tokens where there is no `spent`; the loss is the validation loss where it was
    measured on the way, else the training loss. As long as the shortest of them.
    """
    lines = [line for log in logs for line in log]
    y = "valid_loss" if any(line.get("valid_loss") is not None for line in lines) else "loss"
    x = "spent" if any(line.get("spent") is not None for line in lines) else "tokens"
    kept = [[(float(line[x]), float(line[y])) for line in log if line.get(y) is not None] for log in logs]
    points = zip(*(log[: min(map(len, kept))] for log in kept), strict=True)
    return [(sum(p[0] for p in point) / len(point), sum(p[1] for p in point) / len(point)) for point in points]


def picture(curves: Mapping[str, Curve], unit: str) -> Picture:
    """The curves of arms in one plot; arms without a measurement are left out."""
    return training_curves({arm: points for arm, points in curves.items() if points}, unit, "loss")


def unit_of(work: Iterable[Mapping[str, float]]) -> str:
    """What the curves of trainings are drawn over, from the figures of their work."""
    return "reference hours (RST)" if all("rst_hours" in figures for figures in work) else "budget spent"


def panels(columns: Mapping[str, Mapping[str, Curve]], unit: str, name: str) -> Picture:
    """A panel for each column, with the curves of its arms, which look alike in all of them."""
    across = min(len(columns), ACROSS)
    down = math.ceil(len(columns) / across)
    drawn, axes = figure(WIDTH, 0.6 + 3.2 * down, down, across)
    every = [axes] if down == across == 1 else list(axes.flat)
    for panel, (column, curves) in zip(every, columns.items(), strict=False):
        draw_curves(panel, curves, unit, "loss")
        panel.set_title(column, color=INK, fontsize=10)
    for empty in every[len(columns) :]:
        empty.set_visible(False)
    shown: dict[str, Any] = {}
    for panel in every:
        for line, label in zip(*panel.get_legend_handles_labels(), strict=True):
            shown.setdefault(label, line)
    if shown:
        look: dict[str, Any] = {"frameon": False, "labelcolor": INK, "fontsize": 9, "ncols": min(len(shown), 6)}
        drawn.legend(list(shown.values()), list(shown), loc="outside lower center", **look)
    return plots.picture(drawn, name, f"Loss over {unit}, means over seeds.")
