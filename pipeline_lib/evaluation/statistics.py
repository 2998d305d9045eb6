"""Mean and standard error over repetitions, and non-finite numbers in JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

Number = float | str
"""A float, or 'inf', '-inf', 'nan': JSON has no such numbers, and a model full of faults yields them."""


def encode(value: float) -> Number:
    """`value` as JSON can hold it."""
    value = float(value)
    return value if math.isfinite(value) else str(value)


def encode_all(tree: Any) -> Any:
    """A tree of dicts and lists whose floats JSON can hold."""
    if isinstance(tree, float):
        return encode(tree)
    if isinstance(tree, dict):
        return {key: encode_all(item) for key, item in tree.items()}
    return [encode_all(item) for item in tree] if isinstance(tree, list) else tree


def summarise(values: Sequence[float]) -> dict[str, Any]:
    """{mean, stderr, n, values} of independent repetitions.

    `stderr` is the standard error of the mean, s/√n with the n−1 estimate of s; null for one value or when
    a value is not finite. The mean of values that are not all finite follows IEEE arithmetic.
    """
    n = len(values)
    if n == 0:
        raise ValueError("no values")
    if not all(math.isfinite(value) for value in values):
        return {"mean": encode(sum(values) / n), "stderr": None, "n": n, "values": [encode(v) for v in values]}
    mean = math.fsum(values) / n
    stderr = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n) if n > 1 else None
    return {"mean": mean, "stderr": stderr, "n": n, "values": [float(v) for v in values]}
