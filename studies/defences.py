"""Defences against bit flips, over training seeds: weight clipping, training with flips, both, and LoRA under flips.

    python -m studies.defences [--seeds 0 1 2]

Each way to train is evaluated clean and with flips, on config.yaml's nano model, data and task, made by Snakemake in
results/studies/defences/ (given again, it goes on where it stopped). Evaluations with flips are repeated over fault
seeds; the mean over these is one value, and the confidence intervals are over training seeds. Writes
studies/defences.json, docs/studies/defences.md and its picture.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from pipeline_lib.artifacts.files import read_json, sha256_file
from pipeline_lib.config.load import merge, read_yaml
from pipeline_lib.config.plan import Plan
from pipeline_lib.evaluation.statistics import summarise
from pipeline_lib.reporting.numbers import Measured, number, plus_minus
from pipeline_lib.reporting.plots import metric_bars
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

NAME, TASK, METRIC, FAULT_SEEDS = "defences", "pydocs", "byte_perplexity", 3
CONFIDENCE = 0.95
ARMS = {"clean": "evaluated clean", "transformed": "evaluated with flips"}

# Bit errors of weights in memory, as in Stutz et al. (2021), at the upper end of their rates: 1 % of all bits, behind
# the zero-out threshold of config.yaml.
FLIPS: dict[str, Any] = {"bitflip": {"weight": {"p": 0.01, "zero_out": 1.25}, "input": {"p": 0.0, "zero_out": None}}}
PRETRAIN: dict[str, Any] = {"pretrain": {"steps": 150}}
CLIPPED: dict[str, Any] = merge(PRETRAIN, {"pretrain": {"clip_weights": 0.1}})
LORA: dict[str, Any] = {
    "finetune": {"method": "lora", "steps": 75, "global_batch": 16, "seq_len": 128, "lr": 2.0e-3, "warmup_steps": 5}
}

EXPERIMENTS: dict[str, dict[str, Any]] = {
    "clean": {"model": "nano", "transform": "plain", "recipe": PRETRAIN},
    "clipped": {"model": "nano", "transform": "plain", "recipe": CLIPPED},
    "clean-flipped": {"from": "clean", "transform": FLIPS},
    "clipped-flipped": {"from": "clipped", "transform": FLIPS},
    "flips": {"model": "nano", "transform": FLIPS, "recipe": PRETRAIN},
    "both": {"model": "nano", "transform": FLIPS, "recipe": CLIPPED},
    "lora": {"from": "clean", "transform": FLIPS, "recipe": LORA},
}
ROWS = {
    "trained clean": "clean-flipped",
    "trained clipped": "clipped-flipped",
    "trained with flips": "flips",
    "trained clipped and with flips": "both",
    "trained clean, then LoRA under flips": "lora",
}
"""How the weights were made → the experiment under flips, whose result has both arms."""
RERUN, RERUN_SEED, RERUN_TOLERANCE = "lora", 0, 0.05


def seeded(config: dict[str, Any], seeds: Sequence[int]) -> dict[str, Any]:
    """`config` with the study's experiments once for every training seed, and nothing else to make."""
    experiments = {}
    for name, entry in EXPERIMENTS.items():
        for seed in seeds:
            own = {"from": at_seed(entry["from"], seed)} if "from" in entry else {}
            experiments[at_seed(name, seed)] = {**entry, **own, "seed": seed}
    return {**config, "experiments": experiments, "tables": {}, "sweeps": {}, "fault_seeds": FAULT_SEEDS}


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Make every row at every seed; the study."""
    config = read_yaml(ROOT / "config.yaml")
    folder = ROOT / "results" / "studies" / NAME
    targets = [f"results/{at_seed(name, seed)}/{TASK}.json" for seed in given.seeds for name in ROWS.values()]
    snakemake(folder, seeded(config, given.seeds), targets)
    results = {target: read_json(folder / target)["result"] for target in targets}
    rows = {}
    for heading, name in ROWS.items():
        made = [results[f"results/{at_seed(name, seed)}/{TASK}.json"] for seed in given.seeds]
        rows[heading] = {}
        for arm in ARMS:
            values = [result[arm]["metrics"][METRIC] for result in made]
            rows[heading][arm] = {"seeds": values, **over_seeds(values)}
    plan = Plan.load(str(folder / "config.yaml"))
    return {
        "study": NAME,
        "settings": {
            "training": trainings(plan, given.seeds[0]),
            "evaluation": {"task": config["tasks"][TASK], "transform": FLIPS, "fault_seeds": FAULT_SEEDS},
            "metric": METRIC,
        },
        "seeds": given.seeds,
        "rows": rows,
        "digest": pipeline_lib(folder, "digest", *targets),
        "rerun": rerun(),
        **machine(),
    }


def trainings(plan: Plan, seed: int) -> dict[str, Any]:
    """The settings of every training but its seed, in full."""
    resolver = plan.resolver
    found = {}
    for name, entry in EXPERIMENTS.items():
        if "recipe" in entry:
            settings = resolver.train(resolver.experiments.get(at_seed(name, seed))).settings
            found[name] = {key: settings[key] for key in ("model", "recipe", "transform")}
    return found


def rerun(folder: Path | None = None) -> dict[str, Any]:
    """A small edition of the row with LoRA: trained clean, adapted and evaluated under flips, on text that is alike
    under every Python, for a few steps. In `folder`, or in a temporary one."""
    if folder is None:
        with tempfile.TemporaryDirectory() as name:
            return rerun(Path(name))
    config = on_words(seeded(read_yaml(ROOT / "config.yaml"), [RERUN_SEED]), TASK, folder)
    experiments, name = config["experiments"], at_seed(RERUN, RERUN_SEED)
    base = experiments[name]["from"]
    experiments[base]["recipe"] = {"pretrain": {}}  # its few steps are those of the small edition
    experiments[name]["recipe"]["finetune"].update(steps=10, global_batch=8, seq_len=64, warmup_steps=2)
    config["experiments"] = {key: experiments[key] for key in (base, name)}
    snakemake(folder, config, [f"results/{name}/{TASK}.json"])
    [weights] = (folder / "results" / "store" / "train").glob("finetune-*/model.safetensors")
    return {
        "experiment": name,
        "metrics": read_json(folder / "results" / name / f"{TASK}.json")["result"]["transformed"]["metrics"],
        "weights": sha256_file(weights),
        "made_with": made_with(),
        "tolerance": RERUN_TOLERANCE,
    }


# -- pages -------------------------------------------------------------------------------------------------------------


def interval(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half the width of its confidence interval by Student's t with n − 1 degrees of freedom)."""
    from scipy.stats import t

    summary = summarise(values)
    return summary["mean"], float(t.ppf((1 + CONFIDENCE) / 2, summary["n"] - 1)) * summary["stderr"]


def derive(study: dict[str, Any]) -> dict[str, str]:
    """The study's page and picture, from its JSON alone."""
    metric = study["settings"]["metric"]
    bars = {heading: {arm: Measured.of(cell) for arm, cell in arms.items()} for heading, arms in study["rows"].items()}
    page = PAGE.format(
        seeds=len(study["seeds"]),
        fault_seeds=study["settings"]["evaluation"]["fault_seeds"],
        percent=f"{CONFIDENCE:.0%}",
        table=_table(study),
        differences=_differences(study),
        by_seed=_by_seed(study),
        settings=yaml.safe_dump(study["settings"], sort_keys=True, allow_unicode=True),
        where=where(study),
        digest=study["digest"],
    )
    return {"docs/studies/defences.md": page, "docs/studies/defences.svg": metric_bars(metric, bars, NAME).svg}


PAGE = """# Defences against bit flips

Five ways to obtain the weights, each evaluated clean and with flips of weight bits of one probability and the same
zero-out threshold. Clipping keeps every weight of the linear layers in a fixed range after each optimizer step;
training with flips has the flips of the evaluation in every forward pass, with the straight-through gradient; LoRA
goes on from what was trained clean, with flips on the merged weights. There are {seeds} trainings of each kind;
LoRA's come on top of the clean ones, so its row has seen more tokens. Every evaluation with flips is repeated over
{fault_seeds} fault seeds, whose mean is one value.

Mean over training seeds, and its {percent} confidence interval (Student's t); lower is better:

{table}
![The rows, evaluated clean above and with flips below; whiskers are standard errors](defences.svg)

## Against training clean

Differences of the same training seed and the same evaluation, with their {percent} confidence intervals: below zero a
defence helped, and an interval that holds zero leaves it open.

{differences}
## Seed by seed

± is the standard error over fault seeds.

{by_seed}
## Settings

```yaml
{settings}```

{where} The digest of all artifacts is `{digest}`.

`make study-defences` makes the study again; the tests derive this page from `studies/defences.json` and repeat a small
edition of the row with LoRA.
"""


def _means(cell: dict[str, Any]) -> list[float]:
    return [float(run["mean"]) for run in cell["seeds"]]


def _lines(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _table(study: dict[str, Any]) -> str:
    body = []
    for heading, arms in study["rows"].items():
        cells = [interval(_means(arms[arm])) for arm in ARMS]
        body.append(
            [heading, *(f"{number(mean)} ± {number(half, 2)} (n={len(study['seeds'])})" for mean, half in cells)]
        )
    return _lines([study["settings"]["metric"], *ARMS.values()], body)


def _differences(study: dict[str, Any]) -> str:
    (_, base), *others = study["rows"].items()
    body = []
    for heading, arms in others:
        line = [heading]
        for arm in ARMS:
            pairs = zip(_means(arms[arm]), _means(base[arm]), strict=True)
            mean, half = interval([own - clean for own, clean in pairs])
            verdict = "open" if abs(mean) <= half else "better" if mean < 0 else "worse"
            line.append(f"{number(mean, 3)} ± {number(half, 2)}: {verdict}")
        body.append(line)
    return _lines(["", *ARMS.values()], body)


def _by_seed(study: dict[str, Any]) -> str:
    body = []
    for heading, arms in study["rows"].items():
        for arm, evaluated in ARMS.items():
            runs = arms[arm]["seeds"]
            body.append([f"{heading}, {evaluated}", *(plus_minus(float(run["mean"]), run["stderr"]) for run in runs)])
    return _lines(["seed", *(str(seed) for seed in study["seeds"])], body)


if __name__ == "__main__":
    seeds = {"type": int, "nargs": "+", "default": [0, 1, 2], "help": "training seeds"}
    main(NAME, __doc__ or "", run, derive, seeds=seeds)
