"""Which bits matter: the sweep `flip-kinds` of config.yaml, on the model that the demo trains.

    python -m studies.flips

Makes results/sweeps/flip-kinds.csv by Snakemake, in this repository's own results/ (what is there already is used), and
writes studies/flips.json, docs/studies/flips.md and the heat map docs/images/flip-kinds.svg.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from pipeline_lib.artifacts.files import sha256_file
from pipeline_lib.config.load import read_yaml
from pipeline_lib.config.plan import Plan
from pipeline_lib.reporting.numbers import label, plus_minus
from pipeline_lib.reporting.sweep_plots import sweep_map
from pipeline_lib.reporting.sweeps import SweepTable, read_sweep
from studies.report import ROOT, machine, made_with, main, on_words, pipeline_lib, snakemake, where

NAME, SWEEP = "flips", "flip-kinds"
TARGET = f"results/sweeps/{SWEEP}.csv"
DATA = "pydocs"
RERUN_TOLERANCE = 1e-3
"""Relative; where processor or versions differ from the study's, sums are rounded another way."""
RERUN_ERRORS = 4
"""Standard errors of the difference that are also allowed where exponents of activations flip: a sum that is rounded to
the other side of a power of two has other exponent bits, and flips make of them another value. Weights changed by 1e-7
of themselves moved such a loss by up to 8e-4, nearly as much as other faults do, one under flips of weights by 1e-6.
"""


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Make the sweep; the study."""
    subprocess.run([sys.executable, "-m", "snakemake", TARGET], cwd=ROOT, check=True)
    return {
        "study": NAME,
        "settings": settings(),
        "csv": (ROOT / TARGET).read_text(encoding="utf-8").splitlines(),
        "digest": pipeline_lib(ROOT, "digest", TARGET),
        "rerun": rerun(),
        **machine(),
    }


def settings() -> dict[str, Any]:
    """What of config.yaml decides about the figures."""
    config = read_yaml(ROOT / "config.yaml")
    sweep = config["sweeps"][SWEEP]
    plan = Plan.load(str(ROOT / "config.yaml"))
    training = plan.resolver.train(plan.resolver.experiments.get("plain-nano")).settings
    return {
        "sweep": {key: sweep[key] for key in ("experiment", "task", "grid", "settings", "metric")},
        "task": config["tasks"][sweep["task"]],
        "experiment": config["experiments"][sweep["experiment"]],
        "training": {key: training[key] for key in ("model", "recipe", "seed")},
        "fault_seeds": config["fault_seeds"],
    }


def rerun(folder: Path | None = None) -> dict[str, Any]:
    """A small edition of four points, which CI runs again: the same model, transform and sweep, on text that is alike
    under every Python, after a few steps of training. In `folder`, or in a temporary one."""
    if folder is None:
        with tempfile.TemporaryDirectory() as name:
            return rerun(Path(name))
    config = on_words(read_yaml(ROOT / "config.yaml"), DATA, folder)
    sweep = config["sweeps"][SWEEP]
    config["tasks"][sweep["task"]].update(max_length=64)
    grid = {"p_exp": [0, 0.0625], "p_frac": [0.5], "operand": sweep["grid"]["operand"], "layers": {"mlp": "*.mlp.*"}}
    config.update(
        experiments={name: config["experiments"][name] for name in ("plain-nano", "plain-nano-guarded")},
        sweeps={SWEEP: {**sweep, "grid": grid}},
        tables={},
    )
    snakemake(folder, config, [TARGET])
    [weights] = (folder / "results" / "store" / "train").glob("*/model.safetensors")
    return {
        "csv": (folder / TARGET).read_text(encoding="utf-8").splitlines(),
        "weights": sha256_file(weights),
        "made_with": made_with(),
        "tolerance": RERUN_TOLERANCE,
    }


def table(study: dict[str, Any]) -> SweepTable:
    """The sweep."""
    return read_sweep("\n".join(study["csv"]) + "\n", study["settings"]["sweep"]["metric"])


def summary(study: dict[str, Any]) -> str:
    """Flips of sign and exponent alone: a row for each operand and class of layers, a column a probability."""
    sweep = table(study)
    metric, found = sweep.main_metric(), [point for point in sweep.points if point[0][1] == 0]
    columns = list(dict.fromkeys(values[0] for values, _ in found))
    lines = [f"| {metric}, p_frac = 0 | {' | '.join(f'p_exp = {label(p)}' for p in columns)} |"]
    lines += [f"| --- |{' ---: |' * len(columns)}"]
    for rest in dict.fromkeys(tuple(values[2:]) for values, _ in found):
        cells = [plus_minus(m[metric].mean, m[metric].stderr) for values, m in found if tuple(values[2:]) == rest]
        lines.append(f"| {rest[0]}, {rest[1]} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def derive(study: dict[str, Any]) -> dict[str, str]:
    """docs/studies/flips.md and the heat map."""
    sweep, used = table(study), study["settings"]
    metric = sweep.main_metric()
    model, recipe = used["training"]["model"], used["training"]["recipe"]
    documents = f"{used['task']['limit']} documents of task {used['task']['task']}"
    trained = f"{recipe['steps']} steps at learning rate {recipe['lr']:g}, seed {used['training']['seed']}"
    guard = used["experiment"]["transform"]["bitflip"]
    points = [f"| {' | '.join([*sweep.axes, metric, 'n'])} |", f"|{' --- |' * len(sweep.axes)} ---: | ---: |"]
    for values, metrics in sweep.points:
        figure = plus_minus(metrics[metric].mean, metrics[metric].stderr)
        points.append(f"| {' | '.join(map(label, values))} | {figure} | {metrics[metric].n} |")
    page = f"""# Which bits matter

The sweep `{SWEEP}` of config.yaml: a llama of {model["layers"]} layers of width {model["dim"]}, {trained},
trained without flips and evaluated in fp32 on {documents}. Only one operand of one class of layers is flipped at a
time. Zero-out thresholds: weights {guard["weight"]["zero_out"]:g}, activations {guard["input"]["zero_out"]:g}. Mean ±
standard error over {used["fault_seeds"]} fault seeds; without flips nothing is random, so there n = 1. The error says
nothing about another training seed or other text.

![heat map](../images/{SWEEP}.svg)

{summary(study)}
{where(study)} Made again by `python -m studies.{NAME}`; the tests derive this page from `studies/{NAME}.json` and 
repeat four points of a small edition.

## All points

{chr(10).join(points)}
"""
    return {
        f"docs/studies/{NAME}.md": page,
        f"docs/images/{SWEEP}.svg": sweep_map(sweep, metric, SWEEP).svg,
    }


if __name__ == "__main__":
    main(NAME, __doc__ or "", run, derive)
