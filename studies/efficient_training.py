"""Efficient-training methods against a baseline under fixed budgets, with two planted methods whose effect is known.

    python -m studies.efficient_training [--seeds 0 1 2] [--jobs 2]

Every method trains `bert-nano` on `pydocs` at two budgets of reference hours and with every seed; then the loss on
held-out text is taken and the encoder is fine-tuned on a small classification that the tests make, from a hub on
loopback. Of the planted methods `planted-better` takes three steps for the price of one and `planted-worse` pays for
each step four times; `planted-slightly-better` and `planted-slightly-worse` end about δ away from the
baseline. A comparison that does not call them better and worse has said nothing about the others. Artifacts are kept in
results/studies/efficient-training/ (given again, it goes on where it stopped). Writes studies/efficient_training.json,
its page and its pictures.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import yaml

from pipeline_lib.artifacts.files import read_json
from pipeline_lib.config.load import read_yaml
from pipeline_lib.config.nodes import Node
from pipeline_lib.config.plan import Plan
from pipeline_lib.config.registry import METHODS
from pipeline_lib.reporting.budget_curves import curve
from pipeline_lib.reporting.comparison import measured
from studies.efficient_training_page import derive
from studies.planted.walk import SHIFT
from studies.report import ROOT, machine, made_with, main

NAME, COMPARISON, MODEL = "efficient_training", "efficient-training", "bert-nano"
PLANTED = {
    f"planted-{size}{word}": f"studies.planted.{size.replace('-', '_')}{word}"
    for size in ("", "slightly-")
    for word in ("better", "worse")
}
"""Methods whose effect is known, and their modules; the last word of a name is the verdict that they must get."""
HOURS = {"short": 2.5e-6, "long": 5.0e-6}
"""Budgets in reference hours."""
TASKS = {
    "held-out": {"type": "validate", "dataset": "pydocs", "sequences": 256, "seq_len": 64},
    "made": {
        "type": "glue", "sets": ["rte", "sst2"], "repo": "tests/made", "epochs": 4, "lr": 3.0e-3, "seq_len": 32,
        "head_width": 64, "seeds": [0, 1, 2],
    },
}  # fmt: skip
MEASURES = [
    {"task": "held-out", "metric": "loss", "delta": 0.02},
    {"task": "made", "metric": "average", "delta": 0.1},
]
LEARNING_RATE = 4.0e-3
"""Of the baseline. Optimizers that are methods get the same multiple of it as in the published recipe (1e-3)."""
RECIPE: dict[str, Any] = {"global_batch": 32, "seq_len": 64, "lr": LEARNING_RATE, "precision": "fp32"}
HOLDOUT = 0.2
"""Share of the documents that the irreducible losses' model is trained on; no arm trains on it."""
ARMS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "layer-stacking": {"initial_layers": 1},
    "layer-dropping": {"group": 8},
    "selective-backprop": {"candidates": 32},
    "rho-loss": {"mega_batch": 64},
    "lion": {"lr": 0.1 * LEARNING_RATE},
    "sophia-g": {"lr": LEARNING_RATE, "hessian_sequences": 16},
    **{name: {} for name in PLANTED},
}
"""Settings of each method that the published ones would not fit: 4 layers, and 32 sequences a step for 1,536."""
RERUN_TOLERANCE = 0.05
"""Largest relative difference of a loss where processor or versions differ."""


def plant() -> None:
    """Make the planted methods known to this process."""
    for name, module in PLANTED.items():
        METHODS.register(name, module)


def budget(hours: float) -> dict[str, Any]:
    """What a column changes: the budget, and how often the loss is looked at on the way."""
    own = {"budget": {"rst_hours": hours, "reference": "flops"}, "valid_every": hours / 8, "valid_sequences": 256}
    return {"recipe": {"cram": own}}


def arm(name: str) -> dict[str, Any]:
    """What an arm changes."""
    if name == "baseline":
        return {}
    own: dict[str, Any] = {"recipe": {"cram": {"methods": [{name: ARMS[name]}]}}}
    return {**own, "losses": "irreducible"} if name == "rho-loss" else own


def config(seeds: Sequence[int], hours: Mapping[str, float] | None = None) -> dict[str, Any]:
    """config.yaml with the study's comparison for all there is to make."""
    whole = read_yaml(ROOT / "config.yaml")
    columns = {name: budget(size) for name, size in (hours or HOURS).items()}
    longest = columns[max(hours or HOURS, key=lambda name: (hours or HOURS)[name])]["recipe"]["cram"]
    held = {**RECIPE, **longest, "split": "holdout"}
    base = {"model": MODEL, "transform": "plain", "tasks": []}
    pydocs = whole["datasets"]["pydocs"]
    return {
        **whole,
        "datasets": {**whole["datasets"], "pydocs": {**pydocs, "split": {**pydocs["split"], "holdout": HOLDOUT}}},
        "experiments": {
            "base": {**base, "recipe": {"cram": RECIPE}},
            "irreducible": {**base, "recipe": {"cram": held}, "seed": 1000},
        },
        "tasks": copy.deepcopy(TASKS),
        "tables": {},
        "sweeps": {},
        "comparisons": {
            COMPARISON: {
                "experiment": "base",
                "arms": {name: arm(name) for name in ARMS},
                "columns": columns,
                "seeds": list(seeds),
                "measures": MEASURES,
            }
        },
        "tracking": {"wandb": "off"},
    }


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Make every cell; the study."""
    folder = ROOT / "results" / "studies" / COMPARISON
    found = make(folder, config(given.seeds), given.jobs)
    return {
        "study": NAME,
        **found,
        "settings": {
            **found["settings"],
            "model": MODEL,
            "hours": HOURS,
            "recipe": RECIPE,
            "methods": ARMS,
            "tasks": TASKS,
            "shift": SHIFT,
        },
        "planted": {name: name.rpartition("-")[2] for name in PLANTED},
        "rerun": rerun(),
        **machine(),
    }


# -- cells -------------------------------------------------------------------------------------------------------------


def make(folder: Path, configuration: dict[str, Any], jobs: int) -> dict[str, Any]:
    """Train and score every cell of a configuration's comparison, in a folder of its own, `jobs` at a time.

    Returns:
        settings, values, higher, work (see `reporting.comparison.judge`) and curves: {column: {arm: points}}.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(configuration, sort_keys=False))
    before = Path.cwd()
    os.chdir(folder)
    try:
        with _hub():
            plant()
            node, _ = Plan.load("config.yaml").view(f"results/tables/{COMPARISON}.csv")
            cells: dict[str, list[Node]] = {}
            for role, upstream in node.inputs.items():
                cells.setdefault(".".join(role.split(":")[1].split(".")[:3]), []).append(upstream)
            _make(list(_shared(node)))
            if jobs > 1:
                spawn = get_context("spawn")
                with ProcessPoolExecutor(jobs, mp_context=spawn, initializer=plant) as pool:
                    for name, _ in zip(cells, pool.map(_make, cells.values()), strict=True):
                        print(name, flush=True)
            else:
                for nodes in cells.values():
                    _make(nodes)
            _make([node])
        return _collected(node)
    finally:
        os.chdir(before)


class _hub:
    """A hub on loopback with the small classification, as long as a `with` lasts."""

    def __enter__(self) -> None:
        from pipeline_lib.evaluation.tasks.glue import SETS
        from tests.evaluation.made_benchmarks import repository
        from tests.hub import FakeHub

        self._hub = FakeHub().__enter__()
        chosen = {name: SETS[name] for name in TASKS["made"]["sets"]}
        self._hub.add("dataset", TASKS["made"]["repo"], repository(chosen, train=160, validation=100))
        self._before = {name: os.environ.get(name) for name in self._hub.env()}
        os.environ.update(self._hub.env())

    def __exit__(self, *_: object) -> None:
        for name, value in self._before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
        self._hub.__exit__()


def _shared(node: Node) -> Iterable[Node]:
    """What several cells are made from, each once: everything above a training or a fine-tuning."""
    seen: set[str] = set()

    def walk(one: Node) -> Iterable[Node]:
        for upstream in one.inputs.values():
            yield from walk(upstream)
        if one.path not in seen and one.stage in ("assets", "dataset", "tokenizer", "tokens", "timing", "score"):
            seen.add(one.path)
            yield one

    # What is fetched comes first: the other stages forbid this process the network.
    yield from sorted(walk(node), key=lambda one: one.stage != "assets")


_DONE: set[str] = set()


def _make(nodes: Sequence[Node]) -> None:
    """Artifacts, and what they are made from."""
    import torch

    from pipeline_lib.stages.runner import run_stage
    from pipeline_lib.stages.wiring import freeze

    torch.set_num_threads(1)
    for node in nodes:
        if node.path in _DONE:
            continue
        _make(list(node.inputs.values()))
        freeze(node)
        if run_stage(Path(node.path) / "manifest.json", threads=1):
            raise RuntimeError(f"{node.path} could not be made")
        _DONE.add(node.path)


def _collected(node: Node) -> dict[str, Any]:
    results = {
        r.removeprefix("result:"): _read(n, "result.json") for r, n in node.inputs.items() if r.startswith("res")
    }
    trainings = {r.removeprefix("train:"): _read(n, "train.json") for r, n in node.inputs.items() if r.startswith("tr")}
    settings = dict(node.settings)
    values, higher, work = measured(settings, results, trainings)
    curves: dict[str, Any] = {}
    for c, column in enumerate(settings["columns"]):
        for a, arm in enumerate(settings["arms"]):
            logs = [_log(node.inputs[f"train:{c}.{a}.{s}"]) for s in range(len(settings["seeds"]))]
            curves.setdefault(column, {})[arm] = curve(logs)
    return {"settings": settings, "values": values, "higher": higher, "work": work, "curves": curves}


def _read(node: Node, file: str) -> dict[str, Any]:
    return read_json(Path(node.path) / file)["result"]


def _log(node: Node) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(node.path) / "log" / "metrics.jsonl").read_text().splitlines()]


# -- the cells that CI makes again -------------------------------------------------------------------------------------


def rerun(folder: Path | None = None) -> dict[str, Any]:
    """The baseline and the two that pay another price, at one small budget on text that is alike under every Python."""
    if folder is None:
        with tempfile.TemporaryDirectory() as name:
            return rerun(Path(name))
    from tests.workflow.clone import write_words

    small = copy.deepcopy(config([0, 1], {"small": HOURS["short"] / 10}))
    small["datasets"]["pydocs"] = {
        "source": {"type": "local", "path": "data/*.jsonl"},
        "split": {"valid": 0.3, "test": 0.1, "holdout": HOLDOUT},
    }
    small["tasks"]["held-out"]["sequences"] = None  # all there are
    compared = small["comparisons"][COMPARISON]
    compared["arms"] = {name: compared["arms"][name] for name in ("baseline", "planted-better", "planted-worse")}
    compared["measures"] = MEASURES[:1]
    folder.mkdir(parents=True, exist_ok=True)
    write_words(folder / "data")
    found = make(folder, small, 1)
    return {"values": found["values"], "work": found["work"], "made_with": made_with(), "tolerance": RERUN_TOLERANCE}


if __name__ == "__main__":
    options: dict[str, Any] = {
        "seeds": {"type": int, "nargs": "+", "default": [0, 1, 2], "help": "training seeds"},
        "jobs": {"type": int, "default": 2, "help": "cells at a time, one core each"},
    }
    main(NAME, __doc__ or "", run, derive, **options)
