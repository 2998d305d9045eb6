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
from studies.relora_page import LARGE_ARMS, cell, derive
from studies.report import ROOT, machine, main

NAME, MODEL = "relora", "nano"
ARMS: dict[str, dict[str, Any]] = {
    "plain": {"transform": "plain", "recipe": "cram"},
    "ternary": {"transform": "ternary", "recipe": "cram"},
    "ReLoRA": {"transform": "plain", "recipe": "relora"},
    "ReLoRA on ternary": {"transform": "ternary", "recipe": "relora"},
}
RATES = (4.0e-3, 8.0e-3, 1.6e-2)
POINTS = 4
VALIDATION = 64  # sequences
COMMON = {"global_batch": 8, "seq_len": 64, "betas": [0.9, 0.95], "weight_decay": 0.1, "max_norm": 1.0, "eps": 1e-8}
LARGE: dict[str, Any] = {
    "layers": 5, "measured_layers": 2, "micro_batch": 1, "accumulation": 2, "seq_lens": [64, 32], "rank": 128,
    "precision": "bf16", "activation_checkpointing": "full",
}  # fmt: skip
PUBLISHED_TOKENS = 4 * 1024
"""Tokens of a micro-batch of the ready experiments, and at most of a published one."""


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
    return {
        "study": NAME,
        "settings": {"model": MODEL, "steps": given.steps, "rates": list(RATES), "arms": ARMS},
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
    """Two layers of mistral-1b in each arm: stated against measured bytes, and stated for all layers and tokens."""
    from dataclasses import asdict

    import torch

    torch.set_num_threads(1)
    shape = read_yaml(ROOT / "config.yaml")["models"]["mistral-1b"]["mistral"]
    vocab = read_yaml(ROOT / "config.yaml")["tokenizers"]["mistral"]["vocab"]
    sizes = {**shape, "layers": LARGE["measured_layers"], "vocab": vocab, "max_seq_len": max(LARGE["seq_lens"])}
    rows = {}
    for arm in LARGE_ARMS:
        note = folder / f"large-{arm}.json"
        if not note.exists():
            first, second = (_measured(arm, sizes, length) for length in LARGE["seq_lens"])
            whole = first.at(LARGE["layers"], PUBLISHED_TOKENS, second)
            both = [{"stated": found.account.total(), "measured": found.peak} for found in (first, second)]
            components = {"components": asdict(first.account), "all_layers": asdict(whole)}
            write_json(note, {**both[0], "second": both[1], **components, "all_layers_total": whole.total()})
            print(arm, read_json(note), flush=True)
        rows[arm] = read_json(note)
    return {"settings": {**LARGE, "published_tokens": PUBLISHED_TOKENS, "shape": sizes}, "arms": rows}


def _measured(arm: str, sizes: dict[str, Any], length: int) -> Any:
    """An arm on sequences of `length` tokens: what it states and what it took."""
    import torch

    from pipeline_lib.evaluation.base import Subject
    from pipeline_lib.evaluation.tasks.memory import Settings
    from pipeline_lib.evaluation.training_memory import measure
    from pipeline_lib.models import mistral

    given = {
        key: LARGE[key] for key in ("micro_batch", "accumulation", "rank", "precision", "activation_checkpointing")
    }
    torch.manual_seed(0)
    subject = Subject(mistral.build(sizes).eval(), None, None, 1)  # type: ignore[arg-type]
    return measure(subject, arm, Settings.model_validate({**given, "seq_len": length}), 0, use_up=True)


if __name__ == "__main__":
    options: dict[str, Any] = {
        "seeds": {"type": int, "nargs": "+", "default": [0, 1, 2], "help": "training seeds"},
        "steps": {"type": int, "default": 120, "help": "optimizer steps of each training"},
        "no-large": {"action": "store_true", "help": "leave out the memory of the large shape"},
    }
    main(NAME, __doc__ or "", run, derive, **options)
