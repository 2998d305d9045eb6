"""Zero-out thresholds proposed from measured ranges, as JSONL, a table, and YAML to paste. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import yaml

from pipeline_lib.evaluation.base import Arms
from pipeline_lib.evaluation.records import jsonl

OPERANDS = ("weight", "input")


def propose(record: Mapping[str, Any], of: str, margin: float) -> dict[str, Any]:
    """{zero_out: {weight, input}} for one layer: `margin` times its `top` or `max`, up to three digits.

    Args:
        record: {weight: {top, max}, input: …}.
        of: `max`, or `quantile` for the lower end of the top.
    """
    key = "max" if of == "max" else "top"
    return {"zero_out": {operand: round_up(margin * record[operand][key]) for operand in OPERANDS}}


def round_up(value: float, digits: int = 3) -> float:
    """`value` rounded up to so many significant digits, so that what was below it stays so."""
    if value <= 0:
        return 0.0
    place = digits - 1 - math.floor(math.log10(value))
    found = round(math.ceil(value * 10.0**place) / 10.0**place, max(place, 0))
    return found if found >= value else round(found + 10.0**-place, max(place, 0))


def as_jsonl(arms: Arms) -> str:
    """One line a layer of each run: arm, run, layer, weight and input {top, max, not_finite}, zero_out."""
    return jsonl(
        [
            {"arm": arm, "run": run, **record}
            for arm, runs in arms.items()
            for run, records in runs.items()
            for record in records
        ]
    )


def as_markdown(arms: Arms, settings: Mapping[str, Any]) -> str:
    """A table of the layers for each run."""
    share = f"{100 * settings['top']:g} %"
    of = "the maximum" if settings["threshold"] == "max" else f"the lower end of the top {share}"
    lines = ["# Ranges", "", f"The lower end of the top {share} of |x|, the maximum, and the proposed threshold: "]
    lines[-1] += f"{settings['margin']:g} × {of}."
    for arm, runs in arms.items():
        for run, records in runs.items():
            lines += ["", f"## {arm}" if run == "clean" else f"## {arm}, {run}", ""]
            lines += ["| layer | weight: top | max | zero_out | input: top | max | zero_out |"]
            lines += ["| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
            for record in records:
                cells = [
                    f"{record[operand]['top']:.4g} | {record[operand]['max']:.4g} | {record['zero_out'][operand]:g}"
                    for operand in OPERANDS
                ]
                lines.append(f"| {record['layer']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def as_yaml(arms: Arms, settings: Mapping[str, Any]) -> str:
    """`sites:` of a transform bitflip with the thresholds of each layer; layers that are not listed are left alone."""
    records = next(iter(next(iter(arms.values())).values()))
    sites = {
        record["layer"]: {operand: {"zero_out": record["zero_out"][operand]} for operand in OPERANDS}
        for record in records
    }
    head = f"# {settings['margin']:g} × {settings['threshold']} of |x|; goes below a transform bitflip\n"
    return head + yaml.safe_dump({"sites": sites}, sort_keys=False, default_flow_style=None, width=200)
