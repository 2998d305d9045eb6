"""Plain, ternary, ReLoRA and ReLoRA on ternary weights, trained side by side: same data order, steps, seeds, lr grid.

    python -m studies.relora [--seeds 0 1 2] [--steps 120] [--no-large]

Every arm trains `nano` from the same initial weights on the same batches, at every learning rate of the grid and every
seed; an arm is shown at the rate with the lowest mean final validation loss. Trainings are kept in
results/studies/relora/ (given again, it goes on where it stopped). Then two of the five layers of `mistral-1b` are
trained for two steps in each arm, to hold the stated memory against the allocator's. Writes studies/relora.json and its
page with pictures.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from pipeline_lib.artifacts.files import read_json, write_json
from pipeline_lib.config.load import read_yaml
from pipeline_lib.config.nodes import Node
from pipeline_lib.config.plan import Plan
from pipeline_lib.evaluation.statistics import summarise
from pipeline_lib.reporting.numbers import number, plus_minus
from pipeline_lib.reporting.plots import training_curves
from studies.report import ROOT, machine, main, where

NAME, MODEL = "relora", "nano"
ARMS: dict[str, dict[str, Any]] = {
    "plain": {"transform": "plain", "recipe": "cram"},
    "ternary": {"transform": "ternary", "recipe": "cram"},
    "ReLoRA": {"transform": "plain", "recipe": "relora"},
    "ReLoRA on ternary": {"transform": "ternary", "recipe": "relora"},
}
RATES = (2.0e-3, 4.0e-3, 8.0e-3)
POINTS = 4
VALIDATION = 64  # sequences
COMMON = {"global_batch": 8, "seq_len": 64, "betas": [0.9, 0.95], "weight_decay": 0.1, "max_norm": 1.0, "eps": 1e-8}
LARGE = {"layers": 5, "measured_layers": 2, "micro_batch": 1, "accumulation": 2, "seq_len": 256, "rank": 128}
LARGE_ARMS = {"full": "plain", "lora": "LoRA", "relora": "ReLoRA", "relora_ternary": "ReLoRA on ternary"}
PUBLISHED_TOKENS = 4 * 1024
"""Tokens of a published micro-batch."""


def recipe(arm: str, steps: int, rate: float) -> dict[str, Any]:
    """The recipe of a training; what arms share is equal."""
    own: dict[str, Any] = {**COMMON, "steps": steps, "lr": rate, "warmup_fraction": 0.1, "min_lr_factor": 0.1}
    if ARMS[arm]["recipe"] == "relora":
        own |= {"rank": 16, "reset_every": steps // 4, "reset_warmup": max(steps // 40, 1)}
    return {ARMS[arm]["recipe"]: own}


def experiment(arm: str, steps: int, rate: float, seed: int) -> dict[str, Any]:
    """An entry of `experiments:`."""
    own = {"model": MODEL, "transform": ARMS[arm]["transform"], "recipe": recipe(arm, steps, rate)}
    return {**own, "seed": seed, "tasks": []}


def cell(arm: str, rate: float, seed: int) -> str:
    """The name of a training."""
    return f"{arm.lower().replace(' ', '-')}.{rate:g}.{seed}"


def config(seeds: Sequence[int], steps: int, rates: Sequence[float] = RATES) -> dict[str, Any]:
    """config.yaml with the study's trainings for its experiments."""
    grid = [(arm, rate, seed) for arm in ARMS for rate in rates for seed in seeds]
    return {
        **read_yaml(ROOT / "config.yaml"),
        "experiments": {cell(*at): experiment(at[0], steps, at[1], at[2]) for at in grid},
        "tables": {},
        "sweeps": {},
    }


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Train every cell; the study."""
    folder = ROOT / "results" / "studies" / NAME
    cells = train_cells(folder, config(given.seeds, given.steps), given.steps)
    settings = {arm: {"recipe": recipe(arm, given.steps, RATES[0]), **ARMS[arm]} for arm in ARMS}
    return {
        "study": NAME,
        "settings": {"model": MODEL, "steps": given.steps, "rates": list(RATES), "arms": settings},
        "seeds": given.seeds,
        "cells": cells,
        "large": None if given.no_large else large(folder),
        **machine(),
    }


def train_cells(folder: Path, configuration: dict[str, Any], steps: int) -> dict[str, Any]:
    """Name → curve of every experiment of a configuration, in a folder of its own; what is done already is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(configuration, sort_keys=False))
    before = Path.cwd()
    os.chdir(folder)
    try:
        resolver = Plan.load("config.yaml").resolver
        found = {}
        for name in configuration["experiments"]:
            node = resolver.train(resolver.experiments.get(name))
            note = Path("curves") / f"{node.id}.json"
            if not note.exists():
                write_json(note, _train(node, steps))
                print(name, read_json(note)["points"][-1], flush=True)
            found[name] = read_json(note)
        return found
    finally:
        os.chdir(before)


def _make(node: Node) -> Path:
    """A data artifact, and what it is made from."""
    from pipeline_lib.stages.runner import run_stage
    from pipeline_lib.stages.wiring import freeze

    for upstream in node.inputs.values():
        _make(upstream)
    freeze(node)
    if run_stage(Path(node.path) / "manifest.json", threads=1):
        raise RuntimeError(f"{node.path} could not be made")
    return Path(node.path).resolve()


def _train(node: Node, steps: int) -> dict[str, Any]:
    """Train, and look at the validation text `POINTS` times on the way."""
    import shutil

    import torch

    from pipeline_lib.artifacts.job import Job
    from pipeline_lib.training.loop import Loop
    from pipeline_lib.training.signals import StopRequest

    torch.set_num_threads(1)
    work = Path("work") / node.id
    shutil.rmtree(work, ignore_errors=True)
    (work / "out").mkdir(parents=True)
    inputs = {role: _make(upstream) for role, upstream in node.inputs.items()}
    execution = {"log_every": 1, "checkpoint_every": 10**9, "tracking": {"wandb": "off"}}
    job = Job("train", node.label, node.fingerprint, node.settings, inputs, work, work / "out", execution)
    points: list[dict[str, float]] = []

    class Observed(Loop):
        def _optimizer_step(self) -> tuple[float, float]:
            done = super()._optimizer_step()
            if self.step % (steps // POINTS) == 0:
                points.append({"step": self.step, "train": self.loss, "valid": validation(self)})
            return done

    with StopRequest(None) as stop:
        Observed(job).train(stop)
    lines = [yaml.safe_load(line) for line in (work / "out" / "log" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines]
    for point in points:
        point["stated_mib"] = lines[int(point["step"]) - 1]["mem_stated_mib"]
        first = int(point["step"]) - steps // POINTS
        point["train"] = sum(losses[first : int(point["step"])]) / (steps // POINTS)
    shutil.rmtree(work)
    memory = {key: value for key, value in lines[-1].items() if key.startswith("mem_")}
    return {"points": points, "losses": [round(loss, 5) for loss in losses], "memory": memory}


def validation(loop: Any) -> float:
    """Nats a token on the first sequences of the validation split, computed as the training computes."""
    import torch

    from pipeline_lib.data.tokens import TokenShards
    from pipeline_lib.training.losses import cross_entropy_per_example

    shards, length = TokenShards(loop.job.inputs["tokens"], "valid"), loop.settings.seq_len
    total = count = 0.0
    loop.model.eval()
    with torch.no_grad():
        for first in range(0, min(VALIDATION, (shards.n_tokens - 1) // length), 16):
            rows = range(first, min(first + 16, VALIDATION, (shards.n_tokens - 1) // length))
            text = [torch.from_numpy(shards.read(row * length, length + 1).astype("int64")) for row in rows]
            tokens_BT = torch.stack(text)
            loop.context.begin(loop.step, 0)
            logits_BTV = loop.model(input_ids=tokens_BT[:, :-1], use_cache=False).logits
            total += float(cross_entropy_per_example(logits_BTV, tokens_BT[:, 1:]).sum())
            count += tokens_BT[:, 1:].numel()
    loop.model.train()
    return total / count


# -- memory of the large shape -----------------------------------------------------------------------------------------


def large(folder: Path) -> dict[str, Any]:
    """Two layers of mistral-1b in each arm: stated against measured bytes, and stated for all its layers."""
    import torch

    from pipeline_lib.evaluation.base import Subject
    from pipeline_lib.evaluation.tasks.memory import Settings
    from pipeline_lib.evaluation.training_memory import measure
    from pipeline_lib.models import mistral

    torch.set_num_threads(1)
    shape = read_yaml(ROOT / "config.yaml")["models"]["mistral-1b"]["mistral"]
    vocab = read_yaml(ROOT / "config.yaml")["tokenizers"]["mistral"]["vocab"]
    sizes = {**shape, "layers": LARGE["measured_layers"], "vocab": vocab, "max_seq_len": LARGE["seq_len"]}
    given = {key: LARGE[key] for key in ("micro_batch", "accumulation", "seq_len", "rank")}
    settings = Settings(**given, activation_checkpointing="full")
    rows = {}
    for arm in LARGE_ARMS:
        note = folder / f"large-{arm}.json"
        if not note.exists():
            torch.manual_seed(0)
            subject = Subject(mistral.build(sizes).eval(), None, None, 1)  # type: ignore[arg-type]
            found = measure(subject, arm, settings, 0, use_up=True)
            work = PUBLISHED_TOKENS / (LARGE["micro_batch"] * LARGE["seq_len"])
            whole = found.at(LARGE["layers"], work)
            write_json(
                note,
                {
                    "stated": found.account.total(),
                    "measured": found.peak,
                    "components": vars(found.account),
                    "all_layers": vars(whole),
                    "all_layers_total": whole.total(),
                },
            )
            print(arm, read_json(note), flush=True)
            del subject, found
        rows[arm] = read_json(note)
    return {"settings": {**LARGE, "shape": sizes}, "arms": rows}


# -- pages -------------------------------------------------------------------------------------------------------------


def derive(study: dict[str, Any]) -> dict[str, str]:
    """The study's page and picture, from its JSON alone."""
    settings, seeds = study["settings"], study["seeds"]
    best = {arm: best_rate(study, arm) for arm in settings["arms"]}
    curves = {arm: _mean_losses(study, arm, best[arm]) for arm in best}
    page = PAGE.format(
        arms=len(best),
        seeds=len(seeds),
        steps=settings["steps"],
        best="; ".join(f"{arm} {rate:g}" for arm, rate in best.items()),
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

The trainings are short and the model is small: this shows that the arms are comparable and what each costs here, not
how they would rank at a billion parameters.

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


def _steps_table(study: dict[str, Any], best: dict[str, float]) -> str:
    rows = []
    for index in range(POINTS):
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
        f"{used['measured_layers']} of its {used['layers']} layers, two steps of {used['accumulation']} forward passes of "
        f"{used['micro_batch']} sequence of {used['seq_len']} tokens, fp32, blocks recomputed, rank {used['rank']}; GiB. "
        "Measured is the allocator's peak.\n\n"
        + _table(heads, rows)
        + f"\nThe statement applied to all {used['layers']} layers and to the {PUBLISHED_TOKENS} tokens of a published "
        "forward pass (activations are in proportion to tokens), GiB:\n\n"
        + _table(["arm", "device", "share of plain", "host"], grown)
    )


if __name__ == "__main__":
    options: dict[str, Any] = {
        "seeds": {"type": int, "nargs": "+", "default": [0, 1, 2], "help": "training seeds"},
        "steps": {"type": int, "default": 120, "help": "optimizer steps of each training"},
        "no-large": {"action": "store_true", "help": "leave out the memory of the large shape"},
    }
    main(NAME, __doc__ or "", run, derive, **options)
