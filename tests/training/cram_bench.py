"""Tiny trainings of recipe cram in this process, whole or broken off after a step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline_lib.artifacts.files import read_json
from pipeline_lib.artifacts.job import Job
from pipeline_lib.config.registry import METHODS
from pipeline_lib.training.recipes import cram
from tests.training_bench import MODELS, make_tokens, make_with_transformers

BUDGET = {"flops": 2.4e8}
Settings: Any = cram.Settings
SMALL: dict[str, dict[str, Any]] = {
    "layer-stacking": {"initial_layers": 1},
    "layer-dropping": {"group": 2},
    "selective-backprop": {"candidates": 4, "history": 20},
    "sophia-g": {"hessian_sequences": 4, "hessian_every": 2},
    "adamw": {"betas": [0.5, 0.6]},
}
"""Settings of methods whose defaults are too large for it, or are the recipe's own."""
CRAMMED = {**MODELS["bert"], "layers": 4, "crammed": True}
SHAPES = {"llama": {**MODELS["llama"], "layers": 4}, "bert": {**MODELS["bert"], "layers": 4}, "crammed": CRAMMED}


class Killed(BaseException):
    """The process ends here, and nothing is saved."""


class Stop:
    """A request to stop that never comes; a kill after the `dies_after`-th step of this process."""

    def __init__(self, dies_after: int | None) -> None:
        self.left = dies_after

    def agreed(self) -> bool:
        """Never asked to stop."""
        if self.left is not None:
            self.left -= 1
            if self.left == 0:
                raise Killed
        return False


class Bench:
    """Trainings on the same random text, each in a folder of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.inputs = {"tokens": make_tokens(root), "tokenizer": root / "tokenizer"}
        make_with_transformers(root)

    def job(
        self,
        name: str,
        shape: str = "crammed",
        execution: dict[str, Any] | None = None,
        transform: list[dict[str, Any]] | None = None,
        **recipe: Any,
    ) -> Job:
        """The job of a name; `recipe` overrides settings."""
        given = {"global_batch": 8, "seq_len": 16, "lr": 1e-2, **recipe}
        if not {"budget", "steps"} & set(given):
            given["budget"] = BUDGET
        settings = Settings(**given).resolved(None)
        work = self.root / name
        (work / "out").mkdir(parents=True, exist_ok=True)
        spec = {"model": SHAPES[shape], "transform": transform or [], "recipe": settings.semantic(), "seed": 3}
        run = {"tracking": {"wandb": "off"}, "log_every": 1, "micro_batch": 4, "checkpoint_every": 3}
        run |= {"recipe": settings.operational(), **(execution or {})}
        return Job("train", name, "c" * 64, json.loads(json.dumps(spec)), self.inputs, work, work / "out", run)

    def loop(self, name: str, shape: str = "crammed", **given: Any) -> Any:
        """The training of a name, resumed where it was broken off, and not run yet."""
        from pipeline_lib.training.loop import Loop

        return Loop(self.job(name, shape, **given))

    def train(self, name: str, shape: str = "crammed", dies_after: int | None = None, **given: Any) -> Path:
        """The artifact of a training; one that was broken off goes on."""
        loop = self.loop(name, shape, **given)
        try:
            loop.train(Stop(dies_after))
        except Killed:
            assert dies_after is not None
        return self.root / name / "out"


def method(name: str) -> dict[str, Any]:
    """A method with settings for a tiny model."""
    return {name: SMALL.get(name, {})}


def composed() -> list[dict[str, Any]]:
    """The three methods that change layers and text, together."""
    return [method(name) for name in ("layer-stacking", "layer-dropping", "selective-backprop")]


def methods() -> list[str]:
    """All registered methods that train on nothing but text; one that NEEDS more has its own tests."""
    return [name for name in METHODS.names() if not getattr(METHODS.load(name), "NEEDS", ())]


def result(out: Path) -> dict[str, Any]:
    """What train.json says."""
    return read_json(out / "train.json")["result"]


def lines(out: Path) -> list[dict[str, Any]]:
    """The log."""
    return [json.loads(line) for line in (out / "log" / "metrics.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[float]:
    """The loss of every step."""
    return [line["loss"] for line in lines(out)]
