"""What studies share: their JSON, the files derived from it, and Snakemake in a folder of their own."""

from __future__ import annotations

import argparse
import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from pipeline_lib.artifacts.files import read_json, write_bytes, write_json
from pipeline_lib.artifacts.provenance import commit, hardware, versions
from pipeline_lib.evaluation.statistics import summarise

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "studies"
Derive = Callable[[dict[str, Any]], dict[str, str]]
"""A study's JSON → {path in the repository: text} of all that is derived from it; a pure function."""


def load(name: str) -> dict[str, Any]:
    """The committed JSON of a study."""
    return read_json(FOLDER / f"{name}.json")


def machine() -> dict[str, Any]:
    """Hardware, versions and commit, for the JSON."""
    return {"hardware": hardware(), "versions": versions(), "commit": commit()}


def where(study: dict[str, Any]) -> str:
    """One sentence about the machine that a study ran on."""
    hardware, versions = study["hardware"], study["versions"]
    used = f"Python {versions['python']}, torch {versions['torch']}, commit {study['commit'][:12]}"
    return f"Measured on {hardware['processor']}, {hardware['cores']} cores, with {used}."


def made_with() -> dict[str, Any]:
    """What the bytes of a result may depend on. `capability` are the instructions that torch uses here, AVX2 for
    example: others round sums in another way."""
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    return {"versions": versions(), "processor": hardware()["processor"], "capability": capability}


def at_seed(name: str, seed: int) -> str:
    """The name of an experiment at a training seed."""
    return f"{name}.s{seed}"


def over_seeds(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean, standard error and n over training seeds."""
    summary = summarise([float(run["mean"]) for run in runs])
    return {key: summary[key] for key in ("mean", "stderr", "n")}


def on_words(config: dict[str, Any], task: str, folder: Path) -> dict[str, Any]:
    """A small edition of `config` for `folder`: the same models, transforms, recipes and task, on text that is alike
    under every Python, for a few steps of pretraining."""
    from tests.workflow.clone import write_words

    config = copy.deepcopy(config)
    config["datasets"][task] = {
        "source": {"type": "local", "path": "data/*.jsonl"},
        "split": {"valid": 0.1, "test": 0.1},
    }
    config["tokenizers"][task] = {"train": {"dataset": task, "vocab_size": 300}}
    config["models"]["nano"]["recipe"]["pretrain"].update(steps=15, global_batch=8, seq_len=64)
    config["tasks"][task].update(max_length=64)
    config["fault_seeds"] = 2
    write_words(folder / "data")
    return config


def write_pages(files: dict[str, str]) -> None:
    """Write what was derived."""
    for name, text in files.items():
        write_bytes(ROOT / name, text.encode())
        print(name)


def main(
    name: str, doc: str, run: Callable[[argparse.Namespace], dict[str, Any]], derive: Derive, **options: Any
) -> None:
    """The command line of a study: run it and write its JSON, then its pages.

    Args:
        options: further options, name → arguments of `add_argument`.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", action="store_true", help="run nothing: derive the pages from the committed JSON")
    for option, arguments in options.items():
        parser.add_argument(f"--{option}", **arguments)
    given = parser.parse_args()
    if not given.pages:
        write_json(FOLDER / f"{name}.json", run(given))
    write_pages(derive(load(name)))


def snakemake(folder: Path, config: dict[str, Any], targets: list[str]) -> None:
    """Make targets in `folder`, which has a configuration and results of its own; goes on where it stopped."""
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False).encode())
    options = ["--snakefile", str(ROOT / "Snakefile"), "--workflow-profile", str(ROOT / "profiles" / "default")]
    subprocess.run([sys.executable, "-m", "snakemake", *options, *targets], cwd=folder, check=True)


def pipeline_lib(folder: Path, *arguments: str) -> str:
    """The last line that `python -m pipeline_lib …` prints in `folder`."""
    command = [sys.executable, "-m", "pipeline_lib", *arguments]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    if done.returncode != 0:
        raise RuntimeError(f"{arguments}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout.splitlines()[-1]
