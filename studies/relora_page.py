"""The page of the study `relora`, from its JSON alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from pipeline_lib.evaluation.statistics import summarise
from pipeline_lib.reporting.numbers import number, plus_minus
from pipeline_lib.reporting.plots import training_curves
from studies.report import where

ORDER = ("plain", "ternary", "ReLoRA", "ReLoRA on ternary")
LARGE_ARMS = {"full": "plain", "lora": "LoRA", "relora": "ReLoRA", "relora_ternary": "ReLoRA on ternary"}


def cell(arm: str, rate: float, seed: int) -> str:
    """The name of a training."""
    return f"{arm.lower().replace(' ', '-')}.{rate:g}.{seed}"


def derive(study: dict[str, Any]) -> dict[str, str]:
    """The study's page and picture, from its JSON alone."""
    settings, seeds = study["settings"], study["seeds"]
    best = {arm: best_rate(study, arm) for arm in sorted(settings["arms"], key=ORDER.index)}
    curves = {arm: _mean_losses(study, arm, best[arm]) for arm in best}
    page = PAGE.format(
        arms=len(best),
        seeds=len(seeds),
        steps=settings["steps"],
        best="; ".join(f"{arm} {rate:g}" for arm, rate in best.items()),
        edge=_edge(best, settings["rates"]),
        table=_steps_table(study, best),
        differences=_differences(study, best),
        grid=_grid(study, best),
        memory=_nano_memory(study, best),
        large=_large(study["large"]) if study["large"] else "Not measured in this run.\n",
        settings=yaml.safe_dump(settings, sort_keys=True, allow_unicode=True),
        where=where(study),
    )
    picture = training_curves(curves, "steps")
    return {"docs/studies/relora.md": page, "docs/studies/relora.svg": picture.svg}


PAGE = """# ReLoRA and ternary weights, side by side

{arms} ways to train `nano`, from the same initial weights, on the same batches in the same order, for {steps} steps, at
every learning rate of one grid and with {seeds} seeds. `plain` and `ternary` train all weights (ternary ones through a
straight-through gradient); `ReLoRA` trains adapters of rank 16 beside frozen weights, merged four times, and everything
that has no adapter; `ReLoRA on ternary` does the same beside packed ternary weights. Each is shown at the rate with the
lowest mean final validation loss: {best}.

The trainings are short and the model is small: this shows what each arm costs and reaches here, not how they would rank
at a billion parameters. {edge}

{table}
Losses are nats a token, the training loss a mean over the steps since the row above; ± is the standard error over
seeds. Validation is computed as the training computes (with ReLoRA's adapters beside the base), memory as the training
logs it, and it does not change from step to step.

![Training loss over steps, means over seeds](relora.svg)

## Against plain training

Differences of the final validation loss, seed by seed.

{differences}
## The grid

Final validation loss.

{grid}
## Memory at nano

Stated by component, MiB, at the last step; `host` is what lies beside the device.

{memory}
## Memory of mistral-1b

{large}
## Settings

```yaml
{settings}```

{where}

`make study-relora` makes the study again; the tests derive this page from `studies/relora.json` and train two of its
cells again in a small edition.
"""


def curve(study: dict[str, Any], arm: str, rate: float, seed: int) -> dict[str, Any]:
    """What was recorded of a training."""
    return study["cells"][cell(arm, rate, seed)]


def final(study: dict[str, Any], arm: str, rate: float) -> list[float]:
    """Final validation losses, one a seed."""
    return [curve(study, arm, rate, seed)["points"][-1]["valid"] for seed in study["seeds"]]


def best_rate(study: dict[str, Any], arm: str) -> float:
    """The learning rate with the lowest mean final validation loss."""
    return min(study["settings"]["rates"], key=lambda rate: sum(final(study, arm, rate)))


def _edge(best: dict[str, float], rates: Sequence[float]) -> str:
    """A warning where the grid ends at a best rate."""
    at = [arm for arm, rate in best.items() if rate == max(rates)]
    return f"The best rate of {', '.join(at)} is the largest of the grid: a larger one may be better." if at else ""


def _mean(values: Sequence[float]) -> str:
    summary = summarise(list(values))
    return plus_minus(float(summary["mean"]), summary["stderr"])


def _mean_losses(study: dict[str, Any], arm: str, rate: float) -> list[tuple[float, float]]:
    runs = [curve(study, arm, rate, seed)["losses"] for seed in study["seeds"]]
    means = [sum(column) / len(runs) for column in zip(*runs, strict=True)]
    width = 5
    smooth = [sum(means[i : i + width]) / width for i in range(0, len(means) - width + 1, width)]
    return [(width * (i + 1), value) for i, value in enumerate(smooth)]


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (len(heads) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def _points(study: dict[str, Any], best: dict[str, float]) -> list[dict[str, float]]:
    return curve(study, "plain", best["plain"], study["seeds"][0])["points"]


def _steps_table(study: dict[str, Any], best: dict[str, float]) -> str:
    rows = []
    for index in range(len(_points(study, best))):
        for arm, rate in best.items():
            points = [curve(study, arm, rate, seed)["points"][index] for seed in study["seeds"]]
            losses = [_mean([point[key] for point in points]) for key in ("train", "valid")]
            rows.append([f"{points[0]['step']}, {arm}", *losses, number(points[0]["stated_mib"], 4)])
    return _table(["step, arm", "training loss", "validation loss", "memory, MiB"], rows)


def _differences(study: dict[str, Any], best: dict[str, float]) -> str:
    plain = final(study, "plain", best["plain"])
    rows = []
    for arm, rate in best.items():
        if arm != "plain":
            differences = [own - base for own, base in zip(final(study, arm, rate), plain, strict=True)]
            rows.append([arm, _mean(differences), *(number(value, 3) for value in differences)])
    return _table(["arm", "difference", *(f"seed {seed}" for seed in study["seeds"])], rows)


def _grid(study: dict[str, Any], best: dict[str, float]) -> str:
    rates = study["settings"]["rates"]
    rows = [[arm, *(_mean(final(study, arm, rate)) for rate in rates)] for arm in best]
    return _table(["arm", *(f"rate {rate:g}" for rate in rates)], rows)


def _nano_memory(study: dict[str, Any], best: dict[str, float]) -> str:
    parts = ["weights", "adapters", "gradients", "optimizer", "activations", "stated", "host"]
    rows = []
    for arm, rate in best.items():
        memory = curve(study, arm, rate, study["seeds"][0])["memory"]
        rows.append([arm, *(number(memory[f"mem_{part}_mib"], 4) for part in parts)])
    return _table(["arm", *parts], rows)


def _large(large: dict[str, Any]) -> str:
    arms, used = large["arms"], large["settings"]
    gib, full = 2**30, arms["full"]["all_layers_total"]
    rows, grown = [], []
    for arm, found in arms.items():
        parts = [number(value / gib, 3) for name, value in found["components"].items() if name != "host"]
        ratio = found["stated"] / found["measured"]
        rows.append(
            [LARGE_ARMS[arm], *parts, *(number(found[k] / gib, 4) for k in ("stated", "measured")), number(ratio, 4)]
        )
        whole = found["all_layers"]
        share = number(found["all_layers_total"] / full, 3)
        grown.append(
            [LARGE_ARMS[arm], number(found["all_layers_total"] / gib, 4), share, number(whole["host"] / gib, 3)]
        )
    heads = ["arm", "weights", "adapters", "gradients", "optimizer", "activations", "stated", "measured", "ratio"]
    return (
        f"{used['measured_layers']} of its {used['layers']} layers, two steps of {used['accumulation']} forward passes "
        f"of {used['micro_batch']} sequence of {used['seq_lens'][0]} tokens, {used['precision']} products (of as many "
        f"bytes as the published fp16), blocks recomputed, adapters of rank {used['rank']}; GiB. "
        "Measured is the allocator's peak.\n\n"
        + _table(heads, rows)
        + f"\nThe statement applied to all {used['layers']} layers and to the {used['published_tokens']} tokens of a "
        f"forward pass of the ready experiments (activations from those at {used['seq_lens'][0]} and "
        f"{used['seq_lens'][1]} tokens), GiB:\n\n" + _table(["arm", "device", "share of plain", "host"], grown)
    )
