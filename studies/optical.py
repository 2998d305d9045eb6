"""Optical arithmetic: how much a model loses to it, and which way of obtaining the weights loses least.

    python -m studies.optical [--seeds 0 1 2]

Ways: trained clean and only calibrated; trained clean and continued under the transform (all weights, or LoRA); trained
under it from scratch, with its full strength from the first step or eased in. Each at 2⁴ … 2⁸ levels, over training
seeds, beside exact trainings of the same length, on config.yaml's `nano` with short sequences. Every stage is a real
one, run in a process of its own in results/studies/optical/ (given again, it goes on where it stopped). Writes
studies/optical.json and its page with a picture.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from pipeline_lib.artifacts.files import read_json, write_json
from pipeline_lib.config.load import read_yaml
from pipeline_lib.config.nodes import Node
from pipeline_lib.config.plan import Plan
from studies.optical_page import derive
from studies.report import ROOT, at_seed, machine, made_with, main, on_words

NAME, TASK, METRIC = "optical", "pydocs", "byte_perplexity"
LEVELS = (16, 32, 64, 128, 256)
STEPS, MORE = 80, 20
"""Optimizer steps of what is trained clean, and those that continue it; from scratch has the sum."""
RAMP = {"of": "levels", "steps": (STEPS + MORE) // 2}
SHAPE = {"global_batch": 8, "seq_len": 64}
EVALUATION = {"max_length": 64, "limit": 4}
FULL: dict[str, Any] = {"finetune": {**SHAPE, "steps": MORE, "lr": 1.0e-3, "warmup_steps": 2}}
LORA: dict[str, Any] = {"finetune": {**FULL["finetune"], "method": "lora", "lr": 2.0e-3}}
RERUN, RERUN_TOLERANCE = "full.16.s0", 0.05


def pretrain(steps: int) -> dict[str, Any]:
    """From random weights."""
    return {"pretrain": {**SHAPE, "steps": steps}}


EXACT: dict[str, dict[str, Any]] = {
    "untrained": {"model": "nano", "transform": "plain", "recipe": {"pretrain": {**SHAPE, "steps": 1, "lr": 1e-8}}},
    "clean": {"model": "nano", "transform": "plain", "recipe": pretrain(STEPS)},
    "clean-longer": {"model": "nano", "transform": "plain", "recipe": pretrain(STEPS + MORE)},
    "clean-continued": {"from": "clean", "transform": "plain", "recipe": FULL},
}
"""Trainings and evaluations in exact arithmetic."""


def at_levels(levels: int) -> dict[str, dict[str, Any]]:
    """The arms under the transform."""
    optical, eased = {"optical": {"levels": levels}}, {"optical": {"levels": levels, "ramp": RAMP}}
    return {
        "post": {"from": "clean", "transform": optical},
        "full": {"from": "clean", "transform": optical, "recipe": FULL},
        "lora": {"from": "clean", "transform": optical, "recipe": LORA},
        "scratch": {"model": "nano", "transform": optical, "recipe": pretrain(STEPS + MORE)},
        "ramp": {"model": "nano", "transform": eased, "recipe": pretrain(STEPS + MORE)},
    }


def seeded(config: dict[str, Any], seeds: Sequence[int], levels: Sequence[int] = LEVELS) -> dict[str, Any]:
    """`config` with the study's experiments for every training seed, and nothing else to make."""
    named = {**EXACT, **{f"{arm}.{n}": entry for n in levels for arm, entry in at_levels(n).items()}}
    experiments = {}
    for name, entry in named.items():
        for seed in seeds:
            own = {"from": at_seed(entry["from"], seed)} if "from" in entry else {}
            experiments[at_seed(name, seed)] = {**entry, **own, "seed": seed, "tasks": []}
    config["tasks"][TASK].update(EVALUATION)
    config["transforms"]["optical"] = {}  # the transform's own defaults
    return {**config, "experiments": experiments, "tables": {}, "sweeps": {}, "fault_seeds": 1}


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Make every cell; the study."""
    config = seeded(read_yaml(ROOT / "config.yaml"), given.seeds)
    cells = make(ROOT / "results" / "studies" / NAME, config)
    return {
        "study": NAME,
        "settings": settings(given.seeds),
        "seeds": given.seeds,
        "cells": cells,
        "rerun": rerun(),
        **machine(),
    }


def settings(seeds: Sequence[int]) -> dict[str, Any]:
    """What was trained and evaluated, in full: the specs of the stages but for the seed, with all defaults."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(yaml.safe_dump(seeded(read_yaml(ROOT / "config.yaml"), seeds[:1], LEVELS[-1:])))
        plan = Plan.load(str(path))
    resolver = plan.resolver
    found = {}
    for name, entry in {**EXACT, **{f"{arm}.{LEVELS[-1]}": e for arm, e in at_levels(LEVELS[-1]).items()}}.items():
        if "recipe" in entry:
            own = resolver.train(resolver.experiments.get(at_seed(name, seeds[0]))).settings
            found[name] = {key: own[key] for key in ("model", "recipe", "transform")}
    _, task = resolver.task(TASK)
    return {"levels": list(LEVELS), "metric": METRIC, "task": task.semantic(), "trainings": found}


def rerun(folder: Path | None = None) -> dict[str, Any]:
    """A small edition of one cell, on text that is alike under every Python. In `folder`, or in a temporary one."""
    if folder is None:
        with tempfile.TemporaryDirectory() as name:
            return rerun(Path(name))
    config = on_words(seeded(read_yaml(ROOT / "config.yaml"), [0], [16]), TASK, folder)
    chosen = {name: config["experiments"][name] for name in ("clean.s0", RERUN)}
    chosen["clean.s0"]["recipe"] = {"pretrain": {}}  # its few steps are those of the small edition
    chosen[RERUN]["recipe"] = {"finetune": {**FULL["finetune"], "steps": 6}}
    found = make(folder, {**config, "experiments": chosen}, [RERUN])
    return {"experiment": RERUN, **found[RERUN], "made_with": made_with(), "tolerance": RERUN_TOLERANCE}


# -- stages in processes of their own ----------------------------------------------------------------------------------


def make(folder: Path, config: dict[str, Any], names: Sequence[str] = ()) -> dict[str, Any]:
    """{experiment: {"mean", "diverged"}} under its own transform, of `names` or all, made by another process."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    command = [sys.executable, "-m", "studies.optical", "--make", str(folder), *names]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    return read_json(folder / "found.json")


def make_here(folder: Path, names: Sequence[str]) -> None:
    """See `make`: this is the other process."""
    from pipeline_lib.stages import clip, convert, dataset, evaluate, tokenizer, tokens, train  # noqa: F401
    from pipeline_lib.training import hf  # noqa: F401
    from pipeline_lib.training.titan import device

    device.prepare()  # torchtitan looks for a device when it is imported
    import pipeline_lib.training.titan.trainer  # noqa: F401

    os.chdir(folder)
    resolver = Plan.load("config.yaml").resolver
    found = {}
    for name in names or resolver.config.experiments:
        arms = resolver.arms(resolver.experiments.get(name), TASK)
        node = arms.get("transformed", arms["clean"])
        diverged = _make(node)
        mean = "inf" if diverged else read_json(Path(node.path) / "result.json")["result"]["metrics"][METRIC]["mean"]
        found[name] = {"mean": mean, "diverged": diverged}
        print(name, found[name], flush=True)
    write_json(Path("found.json"), found)


def _make(node: Node) -> bool:
    """Make an artifact and what it is made from; whether a training on the way diverged, so that there is none."""
    from pipeline_lib.stages.wiring import freeze

    if Path(node.path, "manifest.json").exists():
        return False
    diverged = [_make(upstream) for upstream in node.inputs.values()]
    if any(diverged):
        return True
    freeze(node)
    log = Path(f"{node.stage}-{node.id}.log")
    code = _in_a_fork(node, log)
    if code and node.stage == "train" and "training diverged" in log.read_text():
        return True
    if code:
        raise RuntimeError(f"{node.path}: exit code {code}\n{log.read_text()[-4000:]}")
    log.unlink()
    return False


def _in_a_fork(node: Node, log: Path) -> int:
    from pipeline_lib.stages.runner import run_stage

    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(target, 1)
        os.dup2(target, 2)
        code = run_stage(Path(node.path) / "manifest.json", threads=1)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--make"]:
        make_here(Path(sys.argv[2]), sys.argv[3:])
    else:
        seeds = {"type": int, "nargs": "+", "default": [0, 1, 2], "help": "training seeds"}
        main(NAME, __doc__ or "", run, derive, seeds=seeds)
