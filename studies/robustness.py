"""The demo's table over training seeds: trained clean or with flips, evaluated clean or with flips.

    python -m studies.robustness [--seeds 0 1 2 3 4]

`tables.robustness` of config.yaml is made once for every training seed, by Snakemake in results/studies/robustness/
(given again, it goes on where it stopped). Evaluations with flips are repeated over config.yaml's fault seeds; the mean
over these is one value, and the standard error of a cell is that over training seeds. Writes studies/robustness.json,
docs/studies/robustness.md and its picture.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from pipeline_lib.artifacts.files import read_json, sha256_file
from pipeline_lib.config.load import read_yaml
from pipeline_lib.config.plan import Plan
from pipeline_lib.evaluation.statistics import summarise
from pipeline_lib.reporting.numbers import Measured, arm_of, number, plus_minus
from pipeline_lib.reporting.plots import metric_bars
from pipeline_lib.reporting.tables import Grid
from studies.report import (
    ROOT,
    at_seed,
    machine,
    made_with,
    main,
    on_words,
    over_seeds,
    pipeline_lib,
    snakemake,
    where,
)

NAME, TABLE = "robustness", "robustness"
RERUN_SEED = 0
RERUN_TOLERANCE = 0.05
"""Largest relative difference of a metric where processor or versions differ: sums in another order send the training
of a small model another way."""


def seeded(config: dict[str, Any], seeds: Sequence[int]) -> dict[str, Any]:
    """`config` with the experiments of its table once for every training seed, and nothing else to make."""
    entries = Plan.load(str(ROOT / "config.yaml")).resolver.experiments
    wanted = list(dict.fromkeys(name for row in config["tables"][TABLE]["cells"] for name in row))
    experiments: dict[str, Any] = {}
    while wanted:
        name = wanted.pop()
        entry = entries.entry(name).model_dump(by_alias=True, exclude_defaults=True)
        for seed in seeds:
            own = {"from": at_seed(entry["from"], seed)} if "from" in entry else {"seed": seed}
            experiments[at_seed(name, seed)] = {**entry, **own}
        wanted += [entry["from"]] if "from" in entry else []
    return {**config, "experiments": experiments, "tables": {}, "sweeps": {}}


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Make every cell at every seed; the study."""
    config = read_yaml(ROOT / "config.yaml")
    table = config["tables"][TABLE]
    folder = ROOT / "results" / "studies" / NAME
    names = [name for row in table["cells"] for name in row]
    targets = [f"results/{at_seed(name, seed)}/{table['task']}.json" for seed in given.seeds for name in names]
    snakemake(folder, seeded(config, given.seeds), targets)
    values = {
        name: [_arm(folder, at_seed(name, seed), table["task"])["metrics"][table["metric"]] for seed in given.seeds]
        for name in names
    }
    resolver = Plan.load(str(folder / "config.yaml")).resolver
    training = resolver.train(resolver.experiments.get(at_seed(names[-1], given.seeds[0]))).settings
    return {
        "study": NAME,
        "settings": {
            **{key: table[key] for key in ("task", "metric", "rows", "columns")},
            "training": {key: training[key] for key in ("model", "recipe", "transform")},
            "evaluation": {"task": config["tasks"][table["task"]], "fault_seeds": config["fault_seeds"]},
        },
        "seeds": given.seeds,
        "cells": [
            [{"experiment": name, "seeds": values[name], **over_seeds(values[name])} for name in row]
            for row in table["cells"]
        ],
        "digest": pipeline_lib(folder, "digest", *targets),
        "rerun": rerun(),
        **machine(),
    }


def _arm(folder: Path, experiment: str, task: str) -> dict[str, Any]:
    return arm_of(read_json(folder / "results" / experiment / f"{task}.json")["result"])


# -- the cell that CI runs again ---------------------------------------------------------------------------------------


def rerun(folder: Path | None = None) -> dict[str, Any]:
    """A small edition of the cell trained and evaluated with flips: the same model, transform, recipe and task, on
    text that is alike under every Python, for a few steps. In `folder`, or in a temporary one."""
    if folder is None:
        with tempfile.TemporaryDirectory() as name:
            return rerun(Path(name))
    full = read_yaml(ROOT / "config.yaml")
    table = full["tables"][TABLE]
    experiment, task = at_seed(table["cells"][-1][-1], RERUN_SEED), table["task"]
    config = on_words(seeded(full, [RERUN_SEED]), task, folder)
    target = f"results/{experiment}/{task}.json"
    snakemake(folder, config, [target])
    [weights] = (folder / "results" / "store" / "train").glob("*/model.safetensors")
    return {
        "experiment": experiment,
        "metrics": _arm(folder, experiment, task)["metrics"],
        "weights": sha256_file(weights),
        "made_with": made_with(),
        "tolerance": RERUN_TOLERANCE,
    }


# -- pages -------------------------------------------------------------------------------------------------------------


def derive(study: dict[str, Any]) -> dict[str, str]:
    """The study's page and picture, from its JSON alone."""
    settings = study["settings"]
    cells = [[(cell["experiment"], Measured.of(cell)) for cell in row] for row in study["cells"]]
    grid = Grid(settings["metric"], settings["rows"], settings["columns"], cells)
    bars = {
        heading: {"clean": clean, "transformed": flipped}
        for heading, ((_, clean), (_, flipped)) in zip(grid.rows, grid.cells, strict=True)
    }
    picture = metric_bars(settings["metric"], bars, NAME)
    page = PAGE.format(
        seeds=len(study["seeds"]),
        fault_seeds=settings["evaluation"]["fault_seeds"],
        table=grid.markdown(),
        differences=_differences(study),
        by_seed=_by_seed(study),
        settings=yaml.safe_dump(settings, sort_keys=True, allow_unicode=True),
        where=where(study),
        digest=study["digest"],
    )
    return {"docs/studies/robustness.md": page, "docs/studies/robustness.svg": picture.svg}


PAGE = """# Robustness over training seeds

The demo's table, with {seeds} trainings of each kind instead of one. What was trained clean and what was trained with
bit flips is evaluated clean and with flips, at one probability and with the same zero-out thresholds throughout. Each
evaluation with flips is repeated over {fault_seeds} fault seeds, whose mean is one value; mean, standard error and n of
the table are over training seeds.

{table}
![The four cells with their standard errors: evaluated clean above, with flips below](robustness.svg)

## Against training and evaluating clean

Differences of the same training seed (its initial weights and order of data are alike in both trainings). The last
column is the mean difference in standard errors.

{differences}
## Seed by seed

± is the standard error over fault seeds.

{by_seed}
## Settings

Of the trainings with flips; the clean ones have no transform.

```yaml
{settings}```

{where} The digest of all artifacts is `{digest}`.

`make study-robustness` makes the study again; the tests derive this page from `studies/robustness.json` and repeat a
small edition of the cell trained and evaluated with flips.
"""


def _cells(study: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    settings = study["settings"]
    return [
        (f"{row}, {column}", cell)
        for row, cells in zip(settings["rows"], study["cells"], strict=True)
        for column, cell in zip(settings["columns"], cells, strict=True)
    ]


def _differences(study: dict[str, Any]) -> str:
    (_, clean), *others = _cells(study)
    lines = ["| cell | difference | in standard errors |", "| --- | ---: | ---: |"]
    for heading, cell in others:
        pairs = zip(cell["seeds"], clean["seeds"], strict=True)
        difference = summarise([float(own["mean"]) - float(base["mean"]) for own, base in pairs])
        mean, stderr = float(difference["mean"]), difference["stderr"]
        share = number(mean / stderr, 3) if stderr else "–"
        lines.append(f"| {heading} | {plus_minus(mean, stderr)} | {share} |")
    return "\n".join(lines) + "\n"


def _by_seed(study: dict[str, Any]) -> str:
    cells = _cells(study)
    lines = ["| seed | " + " | ".join(name for name, _ in cells) + " |", "| --- |" + " ---: |" * len(cells)]
    for index, seed in enumerate(study["seeds"]):
        values = (_fault_seeds(cell["seeds"][index]) for _, cell in cells)
        lines.append(f"| {seed} | " + " | ".join(values) + " |")
    return "\n".join(lines) + "\n"


def _fault_seeds(figures: dict[str, Any]) -> str:
    """One value, or mean ± standard error over fault seeds; never the evaluator's own error over documents."""
    return plus_minus(float(figures["mean"]), figures["stderr"])


if __name__ == "__main__":
    seeds = {"type": int, "nargs": "+", "default": [0, 1, 2, 3, 4], "help": "training seeds"}
    main(NAME, __doc__ or "", run, derive, seeds=seeds)
