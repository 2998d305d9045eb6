"""Loss over what was spent of a budget, from the logs of trainings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline_lib.reporting.plots import Picture, training_curves


def curve(logs: Sequence[Sequence[Mapping[str, Any]]]) -> list[tuple[float, float]]:
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


def picture(curves: Mapping[str, Sequence[tuple[float, float]]], unit: str) -> Picture:
    """The curves of arms in one plot; arms without a measurement are left out."""
    return training_curves({arm: points for arm, points in curves.items() if points}, unit, "loss")
