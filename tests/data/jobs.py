"""Jobs made by hand, and what they leave."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

from pipeline_lib.artifacts.files import read_json, sha256_file
from pipeline_lib.artifacts.job import Job
from pipeline_lib.stages import assets, dataset, tokenizer, tokens

STAGES = {"assets": assets, "dataset": dataset, "tokenizer": tokenizer, "tokens": tokens}


def job(stage: str, root: Path, settings: dict[str, Any], **inputs: Path) -> Job:
    """A job below `root`, with an empty out/ as the runner makes it."""
    out = root / "work" / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    return Job(stage, "label", "0" * 64, settings, inputs, root / "work", out)


def run(stage: str, root: Path, settings: dict[str, Any], **inputs: Path) -> Path:
    """Run a stage; returns its out/."""
    made = job(stage, root, settings, **inputs)
    STAGES[stage].run(made)
    return made.out


def dataset_settings(source: dict[str, Any], **other: Any) -> dict[str, Any]:
    """Settings of the dataset stage."""
    return {"source": source, "split": {"valid": 0.1, "test": 0.1}, "max_bytes": None, "seed": 0, **other}


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below `folder`, by path."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in paths}


def result(path: Path) -> Any:
    """The `result` of a JSON file."""
    return read_json(path)["result"]


def sentences(count: int, seed: int = 0) -> list[str]:
    """Texts with a skewed choice of words, some of them not ASCII."""
    rng = random.Random(seed)
    words = ["".join(rng.choice("abcdeéfg日☂") for _ in range(rng.randint(1, 7))) for _ in range(200)]
    return [" ".join(words[int(199 * rng.random() ** 3)] for _ in range(rng.randint(3, 60))) for _ in range(count)]
