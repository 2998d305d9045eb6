"""The page of the study `optical`, from its JSON alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from pipeline_lib.reporting.numbers import Measured, number
from pipeline_lib.reporting.sweep_plots import sweep_curve
from pipeline_lib.reporting.sweeps import SweepTable
from studies.defences import CONFIDENCE, interval
from studies.report import where

ARMS = {
    "post": "trained clean, calibrated",
    "full": "continued, all weights",
    "lora": "continued, LoRA",
    "scratch": "from scratch",
    "ramp": "from scratch, eased in",
}
EXACT = {
    "untrained": "random weights",
    "clean": "trained clean",
    "clean-longer": "trained clean for as many steps as from scratch",
    "clean-continued": "trained clean, continued exactly",
}
JUDGED = (16, 256)
"""Numbers of levels that claims are judged at: where the arithmetic costs most, and as published."""
CLAIMS: list[tuple[str, tuple[str, ...], tuple[str, ...], bool]] = [
    ("from scratch, training fails: it does not get below random weights", ("scratch",), ("untrained",), False),
    ("continuing from a clean checkpoint works better than from scratch", ("full",), ("scratch",), True),
    ("continuing lowers the loss under the transform", ("full",), ("post",), True),
    (
        "continuing wins back some of what the arithmetic costs: the distance to exact arithmetic shrinks",
        ("full", "clean"),
        ("post", "clean-continued"),
        True,
    ),
    ("LoRA under the transform lowers the loss of a small model", ("lora",), ("post",), True),
    ("continuing all weights is better than LoRA", ("full",), ("lora",), True),
    ("optical arithmetic remains worse than exact arithmetic after continuing", ("full",), ("clean-continued",), False),
]
"""(claim, arms that are added, arms that are subtracted, whether the claim is that the difference is below zero)."""

UNTESTED = [
    "the larger the model, the worse continuing works (60 M to 600 M parameters)",
    "LoRA lowers the loss at 60 M parameters and not above",
    "at 400 M parameters a learning rate that is too large makes it diverge again and again",
]


def derive(study: dict[str, Any]) -> dict[str, str]:
    """The study's page and picture, from its JSON alone."""
    settings = study["settings"]
    page = PAGE.format(
        seeds=len(study["seeds"]),
        metric=settings["metric"],
        percent=f"{CONFIDENCE:.0%}",
        table=_table(study),
        exact=_exact(study),
        claims=_claims(study),
        ramp=_ramp(study),
        diverged=_diverged(study),
        continued=_continued(study),
        settings=yaml.safe_dump(settings, sort_keys=True, allow_unicode=True),
        where=where(study),
    )
    points: list[Any] = []
    for arm, heading in ARMS.items():
        for levels in settings["levels"]:
            found = values(study, arm, levels)
            mean, half = interval(found)
            points.append(([levels, heading], {settings["metric"]: Measured(mean, half, len(found))}))
    table = SweepTable(["levels", "weights"], [settings["metric"]], points)
    return {
        "docs/studies/optical.md": page,
        "docs/studies/optical.svg": sweep_curve(table, settings["metric"], "optical").svg,
    }


PAGE = """# Optical arithmetic: which weights stand it

Products of linear layers and of attention between operands of 2⁴ … 2⁸ levels, with a quantised and dithered result
(transform `optical`, its defaults). Five ways to obtain the weights of `nano`, with {seeds} training seeds each:
trained clean and only calibrated; the same, then continued under the transform for a quarter of the steps, all weights
or LoRA; trained under it from scratch for the sum of the steps; and the same with the levels eased in from 2¹⁶ over the
first half. Everything is evaluated under its own arithmetic on the same held-out text.

{metric}, lower is better: mean over training seeds and its {percent} confidence interval (Student's t).

{table}
![The five ways over levels; whiskers are half the confidence intervals' widths](optical.svg)

In exact arithmetic:

| | {metric} |
| --- | ---: |
{exact}
{diverged}{continued}
## Claims

What is reported of the optical runs that this pipeline replaces, each put as a difference of the same training seed, at
256 levels as published and at 16, where the arithmetic costs most.
The original runs had no causal mask, mixed up heads, drew one noise value for a whole tensor, and froze or shrank their
ranges; these are the same claims with that put right, at another size. A claim is supported or refuted where the
{percent} confidence interval of the difference excludes zero, and open else. The intervals are not corrected for there
being several claims.

{claims}
## Does the ramp help?

Eased in minus not eased in, from scratch:

{ramp}
The trainings are short and the model has 1.3 M parameters: this shows what the arithmetic does to such a model. What it
does at 60 M parameters and more, and at other learning rates, is not measured here; `optical-60m-rates` in config.yaml
is the sweep that does it.

## Settings

```yaml
{settings}```

{where}

`make study-optical` makes the study again; the tests derive this page from `studies/optical.json` and repeat a small
edition of one of its cells.
"""


def values(study: dict[str, Any], arm: str, levels: int | None = None) -> list[float]:
    """The metric of an arm, one a training seed of `levels`."""
    name = arm if arm in EXACT else f"{arm}.{levels}"
    return [float(study["cells"][f"{name}.s{seed}"]["mean"]) for seed in study["seeds"]]


def difference(
    study: dict[str, Any], plus: Sequence[str], minus: Sequence[str], levels: int | None
) -> tuple[float, float]:
    """(mean, half the confidence interval's width) of the arms `plus` minus those of `minus`, seed by seed."""
    signed = [(sign, values(study, arm, levels)) for sign, arms in ((1, plus), (-1, minus)) for arm in arms]
    return interval([sum(sign * own[i] for sign, own in signed) for i in range(len(signed[0][1]))])


def verdict(mean: float, half: float, lower: bool) -> str:
    """Whether a difference that is claimed to be below zero (`lower`), or not to be, is."""
    if not abs(mean) > half:
        return "open"
    return "supported" if (mean < 0) == lower else "refuted"


def _figures(found: Sequence[float]) -> str:
    mean, half = interval(found)
    return f"{number(mean)} ± {number(half, 2)}"


def _lines(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _table(study: dict[str, Any]) -> str:
    levels = study["settings"]["levels"]
    body = [[heading, *(_figures(values(study, arm, n)) for n in levels)] for arm, heading in ARMS.items()]
    return _lines([f"n = {len(study['seeds'])}", *(f"{n} levels" for n in levels)], body)


def _exact(study: dict[str, Any]) -> str:
    return "".join(f"| {heading} | {_figures(values(study, arm))} |\n" for arm, heading in EXACT.items())


def _claims(study: dict[str, Any]) -> str:
    body = []
    for claim, plus, minus, lower in CLAIMS:
        arms = " − ".join(_arms(side) for side in (plus, minus))
        for levels in JUDGED:
            mean, half = difference(study, plus, minus, levels)
            interval_text = f"{number(mean - half, 3)} … {number(mean + half, 3)}"
            n = str(len(study["seeds"]))
            said = verdict(mean, half, lower)
            body.append([claim, arms, str(levels), n, number(mean, 3), interval_text, said])
            claim = arms = "″"
    body += [[claim, "one size, one learning rate", "", "0", "", "", "not tested"] for claim in UNTESTED]
    head = ["claim", "arms", "levels", "n", "difference", f"{CONFIDENCE:.0%} interval", "verdict"]
    lines = [head, ["---", "---", "---:", "---:", "---:", "---:", "---"], *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _arms(names: Sequence[str]) -> str:
    said = " + ".join({**ARMS, **EXACT}[name] for name in names)
    return f"({said})" if len(names) > 1 else said


def _ramp(study: dict[str, Any]) -> str:
    body = []
    for levels in study["settings"]["levels"]:
        mean, half = difference(study, ("ramp",), ("scratch",), levels)
        found = "open" if not abs(mean) > half else "it helps" if mean < 0 else "it harms"
        body.append([f"{levels} levels", f"{number(mean, 3)} ± {number(half, 2)}", found])
    return _lines(["", "difference", "verdict"], body)


def _continued(study: dict[str, Any]) -> str:
    mean, half = difference(study, ("clean-continued",), ("clean",), None)
    gains = "improve it by themselves" if mean < 0 and abs(mean) > half else "are no gain by themselves"
    change = f"{number(mean, 3)} ± {number(half, 2)}"
    return (
        f"Continuing in exact arithmetic changes the clean model by {change}: so few steps, at the one\n"
        f"learning rate tried, {gains}, and what continuing under the transform does is to be\n"
        "read against that.\n"
    )


def _diverged(study: dict[str, Any]) -> str:
    names = [name for name, cell in study["cells"].items() if cell["diverged"]]
    return f"Trainings that diverged: {', '.join(names)}.\n" if names else "No training diverged.\n"
