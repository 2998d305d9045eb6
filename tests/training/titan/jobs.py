"""Tiny pretraining jobs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from pipeline_lib.artifacts.files import read_json
from pipeline_lib.artifacts.job import Job
from pipeline_lib.training.recipes.pretrain import Settings
from tests.training_bench import MODELS, make_tokens, make_with_transformers

RECIPE = {"steps": 6, "global_batch": 8, "seq_len": 16, "lr": 1e-2, "warmup_steps": 2}
FAULTS: list[dict[str, Any]] = [{"type": "bitflip", "weight": {"p_frac": 0.01}, "input": {"p_frac": 0.01}}]


def make_inputs(root: Path) -> dict[str, Path]:
    """Tokens of random text, and a tokenizer."""
    make_with_transformers(root)
    return {"tokens": make_tokens(root), "tokenizer": root / "tokenizer"}


def make_job(
    work: Path,
    inputs: dict[str, Path],
    transform: list[dict[str, Any]] | None = None,
    recipe: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    **execution: Any,
) -> Job:
    """A pretraining of a llama with 2 layers."""
    resolved = Settings(**{**RECIPE, **(recipe or {})}).resolved().semantic()
    settings = {
        "model": {**MODELS["llama"], **(model or {})},
        "transform": transform or [],
        "recipe": json.loads(json.dumps(resolved)),
        "seed": 3,
    }
    (work / "out").mkdir(parents=True)
    execution = {"checkpoint_every": 2, "log_every": 1, "tracking": {"wandb": "off"}, **execution}
    return Job("train", "pretrain-llama", "a" * 64, settings, inputs, work / "work", work / "out", execution)


def again(job: Job, **execution: Any) -> Job:
    """The same job in the same work dir with an empty `out`."""
    out = job.out.with_name(job.out.name + "-again")
    out.mkdir()
    return dataclasses.replace(job, out=out, execution={**job.execution, **execution})


def losses(job: Job) -> list[float]:
    """Of every step."""
    lines = (job.out / "log" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def result(job: Job) -> dict[str, Any]:
    """The compared part of train.json."""
    return read_json(job.out / "train.json")["result"]
