"""Numbers as people read them, and metrics as results hold them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline_lib.config.errors import UserError, closest

# Where one metric must stand for a task, the first of these that it has.
PREFERRED = ("word_perplexity", "same_tokens", "acc_norm", "acc", "exact_match", "prompt_level_strict_acc", "f1", "mcc")


@dataclass(frozen=True)
class Measured:
    """A metric's mean over repetitions.

    Attributes:
        mean: may be infinite or NaN.
        stderr: standard error over fault seeds; None when there is one value.
        n: number of repetitions.
        sampling: whether `stderr` is instead the evaluator's own, over documents.
    """

    mean: float
    stderr: float | None
    n: int
    sampling: bool = False

    @staticmethod
    def of(figures: dict[str, Any]) -> Measured:
        """From `{mean, stderr, n, values, sampling_stderr}` of a result."""
        stderr, sampling = figures["stderr"], figures.get("sampling_stderr")
        if stderr is None and figures["n"] == 1 and sampling is not None:
            return Measured(float(figures["mean"]), float(sampling), 1, True)
        return Measured(float(figures["mean"]), None if stderr is None else float(stderr), figures["n"])

    def __str__(self) -> str:
        return plus_minus(self.mean, self.stderr)


def arm_of(result: dict[str, Any]) -> dict[str, Any]:
    """The arm an experiment stands for: under its transform, or clean when it has none."""
    return result.get("transformed", result["clean"])


def metric_of(arm: dict[str, Any], metric: str, where: str) -> Measured:
    """A metric of an arm.

    Raises:
        UserError: the task has no such metric.
    """
    metrics = arm["metrics"]
    if metric not in metrics:
        raise UserError(
            "the task has no such metric",
            where=where,
            value=metric,
            allowed=sorted(metrics),
            fix=closest(metric, metrics) or "choose one of the above",
        )
    return Measured.of(metrics[metric])


def main_metric(names: Sequence[str], first: Sequence[str] = ()) -> str:
    """The one metric shown where there is room for one: of `first`, else of the usual ones, else by the alphabet."""
    return next((name for name in (*first, *PREFERRED) if name in names), sorted(names)[0])


def number(value: float, digits: int = 4) -> str:
    """`value` to `digits` significant digits: 12.35, 1,235, 1.23e+08, ∞."""
    if not math.isfinite(value):
        return "nan" if math.isnan(value) else "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 1e6:
        return f"{value:.{max(digits - 2, 0)}e}".replace("-", "−", 1) if value < 0 else f"{value:.{digits - 2}e}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}".replace("-", "−")


def plus_minus(mean: float, stderr: float | None) -> str:
    """`12.346 ± 0.021`: the error to two significant digits, the mean to the same place."""
    if stderr is None or not math.isfinite(mean) or not math.isfinite(stderr):
        return number(mean)
    if stderr == 0:
        return f"{number(mean)} ± 0"
    place = math.floor(math.log10(stderr))
    if not 1e-3 <= abs(mean) < 1e6 or place >= 6 or place < -6:
        return f"{number(mean)} ± {stderr:.1e}"
    decimals = max(0, 1 - place)
    return f"{mean:,.{decimals}f} ± {stderr:,.{decimals}f}".replace("-", "−")


def count(value: float) -> str:
    """Large counts: 1.34 M, 22.1 B."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:g}"


def label(value: Any) -> str:
    """A setting's value, short: small powers of two as such."""
    if isinstance(value, float):
        exponent = math.log2(value) if value > 0 else 0.5
        if exponent == int(exponent) and exponent < -3:
            return "2" + str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        return f"{value:g}"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    return str(value)
