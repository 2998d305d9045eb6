"""The page of the study `efficient-training`, from its JSON alone."""

from __future__ import annotations

from typing import Any

import yaml

from pipeline_lib.reporting.budget_curves import picture
from pipeline_lib.reporting.comparison import Comparison, arms_table, judge
from pipeline_lib.reporting.numbers import count, number
from studies.report import where

FOLDER = "docs/studies"
STEM = "efficient-training"


def compared(study: dict[str, Any]) -> Comparison:
    """Its verdicts, from its numbers."""
    return judge(study["settings"], study["values"], study["higher"], study["work"])


def verdict_of(made: Comparison, arm: str, task: str) -> dict[str, str]:
    """{column: verdict} of an arm by one task."""
    return {c.column: c.against.word for c in made.cells if c.arm == arm and c.task == task and c.against}


def derive(study: dict[str, Any]) -> dict[str, str]:
    """The study's page, table and pictures, from its JSON alone."""
    settings, made = study["settings"], compared(study)
    pages = {}
    for column in settings["columns"]:
        curves = {arm: study["curves"][column][arm] for arm in settings["arms"]}
        pages[f"{FOLDER}/{STEM}-{column}.svg"] = picture(curves, "reference hours (RST)").svg
    page = PAGE.format(
        methods=sum(arm not in study["planted"] for arm in settings["arms"]) - 1,
        columns=len(settings["columns"]),
        seeds=len(settings["seeds"]),
        hours=", ".join(f"{name} {settings['hours'][name]:g}" for name in settings["columns"]),
        planted=_planted(study, made),
        shift=study["settings"]["shift"],
        sections=_sections(study, made),
        work=_work(study),
        pictures="\n\n".join(f"![Loss over RST, budget {c}]({STEM}-{c}.svg)" for c in settings["columns"]),
        settings=yaml.safe_dump(settings, sort_keys=True, allow_unicode=True),
        where=where(study),
    )
    return {f"{FOLDER}/{STEM}.md": page, **pages}


PAGE = """# Efficient training under a fixed budget

{methods} methods against a baseline whose learning rate decays to nothing within the same budget, at {columns} budgets
(reference hours: {hours}) and with {seeds} seeds: `bert-nano` on `pydocs`. A budget pays for the
passes that a training makes, at the speed of the reference machine, so every method gets the same work done.
Differences to the baseline are taken seed by seed. `better` and `worse`: a two-sided paired t test rejects no
difference at 5 %; `equal within δ`: two one-sided tests reject a difference of δ or more at 5 %; `undecided`: neither.
Verdicts are one test each, not corrected for their number.

The model is tiny and the budgets are seconds: this shows that the comparison works and what it can see, not which
method wins at scale; a verdict here neither supports nor contradicts a published one. No method's settings were tuned,
the baseline's neither. Where the power to see δ is low, as stated under each table, `undecided` says little.

## Planted methods

`planted-better` takes three steps for the price of one, `planted-worse` pays for each step four times.
`planted-slightly-better` and `-worse` are the baseline, moved along a line in the space of weights until the
validation loss is {shift:g} lower or higher; the loss judged here is that of other windows of text, where this comes
to about δ. These two differ from the baseline by next to nothing else, so they show what a verdict makes of an effect
of δ; how often it is seen among differences as noisy as those of the other methods is the power under each table.

{planted}
{sections}
## Loss over RST

Loss on held-out text on the way, means over seeds.

{pictures}

## The work done

Means over seeds: optimizer steps, sequences that went forward and backward, layers these passed, sequences that were
only looked at, sequences for curvature, floating-point operations that were charged.

{work}
## Settings

```yaml
{settings}```

{where}

`make study-efficient-training` makes the study again; the tests derive this page from `studies/efficient_training.json`
and train its planted cells again in a small edition.
"""


def _planted(study: dict[str, Any], made: Comparison) -> str:
    columns = study["settings"]["columns"]
    lines = ["| method | must be | " + " | ".join(columns) + " |", "| --- | --- |" + " --- |" * len(columns)]
    task = study["settings"]["measures"][0]["task"]
    for arm, must in study["planted"].items():
        found = verdict_of(made, arm, task)
        lines.append(f"| {arm} | {must} | " + " | ".join(found[c] for c in columns) + " |")
    return "\n".join(lines) + "\n"


def _sections(study: dict[str, Any], made: Comparison) -> str:
    parts = []
    for measure in study["settings"]["measures"]:
        for column in study["settings"]["columns"]:
            key = (measure["task"], measure["metric"], column)
            cells = [cell for cell in made.cells if (cell.task, cell.metric, cell.column) == key]
            heading = f"## {TITLES.get(measure['task'], measure['task'])}, budget {column}"
            parts.append(f"{heading}\n\n{arms_table(cells, made.level)}\n{made.power(cells)}\n")
    return "\n".join(parts)


TITLES = {"held-out": "Loss on held-out text (nats a masked token)", "made": "Fine-tuned on the made classification"}
KINDS = (
    "steps", "sequences.train", "layer_passes.train", "sequences.forward", "sequences.hessian", "flops",
)  # fmt: skip


def _work(study: dict[str, Any]) -> str:
    lines = ["| budget, method | " + " | ".join(KINDS) + " |", "| --- |" + " ---: |" * len(KINDS)]
    for c, column in enumerate(study["settings"]["columns"]):
        for a, arm in enumerate(study["settings"]["arms"]):
            work = study["work"][f"{c}.{a}"]
            shown = [_figure(work.get(kind), kind) for kind in KINDS]
            lines.append(f"| {column}, {arm} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def _figure(value: float | None, kind: str) -> str:
    if value is None:
        return "–"
    return number(value, 3) if kind == "flops" else count(round(value))
