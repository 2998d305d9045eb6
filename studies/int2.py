"""What 2-bit weights cost a small model, and how much of it distillation brings back.

    python -m studies.int2 [--seeds 0 1 2] [--rates 3e-4 1e-3 3e-3]

A teacher pretrained by the pipeline (`plain-nano`) answers prefixes of its training text. Its weights are rounded to 2
bits in groups of 128: to the nearest value, within clipped ranges, and after distillation on its answers with three
losses. Distillation sees at most a tenth of the pretraining's tokens. The learning rate of each loss is the one with
the lowest loss on the records kept for validation; the test split takes no part in it. Everything is made by
Snakemake in results/studies/int2/ (given again, it goes on where it stopped). Writes studies/int2.json and
docs/studies/int2.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import yaml

from pipeline_lib.artifacts.files import read_json
from pipeline_lib.config.load import read_yaml
from pipeline_lib.config.plan import Plan
from pipeline_lib.evaluation.statistics import summarise
from pipeline_lib.reporting.numbers import number, plus_minus
from studies.report import ROOT, machine, main, pipeline_lib, snakemake, where

NAME, TASK, METRIC, SPEED = "int2", "pydocs", "byte_perplexity", "speed-nano"
TEACHER, RTN, CLIP = "plain-nano", "rounded", "clipped"
LOSSES = ("cakld", "jsd", "ce")
DATA = {"n": 600, "max_new_tokens": 128, "prompts": [{"prefix_chars": 64, "stride": 2000}]}
RECIPE = {"steps": 60, "global_batch": 8, "seq_len": 128, "decay": "linear", "warmup_steps": 3, "data": DATA}
SHARE = 0.1
"""Tokens of distillation, padding included, as a share of the pretraining's: at most this."""


def student(loss: str, rate: float, seed: int) -> str:
    """The name of a distillation."""
    return f"{loss}.{rate:g}.s{seed}".replace("+", "")


def configuration(seeds: list[int], rates: list[float]) -> dict[str, Any]:
    """config.yaml with the study's experiments alone."""
    config = read_yaml(ROOT / "config.yaml")
    entries: dict[str, Any] = {
        TEACHER: {},
        RTN: {"from": TEACHER, "transform": {"int2": {"clip": None}}, "recipe": "none"},
        CLIP: {"from": TEACHER, "transform": {"int2": {"clip": {}}}, "recipe": "none"},
    }
    for loss in LOSSES:
        for rate in rates:
            for seed in seeds:
                entries[student(loss, rate, seed)] = {
                    "from": TEACHER,
                    "teacher": TEACHER,
                    "transform": {"int2": {"clip": {}}},
                    "recipe": {"distill": {**RECIPE, "loss": loss, "lr": rate}},
                    "seed": seed,
                }
    return {**config, "experiments": entries, "tables": {}, "sweeps": {}}


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Choose the rates on validation records, then train at every seed; the study."""
    folder, first = ROOT / "results" / "studies" / NAME, given.seeds[0]
    config = configuration(given.seeds, given.rates)
    plan = _plan(folder, config)
    budget = _tokens(plan, student(LOSSES[0], given.rates[0], first)) / _tokens(plan, TEACHER)
    if budget > SHARE:
        raise ValueError(f"distillation reads {budget:.3f} of the pretraining's tokens, more than {SHARE}")
    tried = {loss: [student(loss, rate, first) for rate in given.rates] for loss in LOSSES}
    snakemake(folder, config, [f"results/{name}/{TASK}.json" for names in tried.values() for name in names])
    valid = {
        loss: {
            f"{rate:g}": _trained(folder, plan, name)["valid_loss"]
            for rate, name in zip(given.rates, names, strict=True)
        }
        for loss, names in tried.items()
    }
    chosen = {loss: min(found, key=lambda rate, found=found: found[rate]) for loss, found in valid.items()}
    students = {loss: [student(loss, float(chosen[loss]), seed) for seed in given.seeds] for loss in LOSSES}
    names = [TEACHER, RTN, CLIP, *(name for group in students.values() for name in group)]
    targets = [f"results/{name}/{TASK}.json" for name in names]
    timed = {"teacher": TEACHER, "int2": students["cakld"][0]}
    speeds = [f"results/{name}/{SPEED}.json" for name in timed.values()]
    snakemake(folder, config, [*targets, *speeds])
    recipe = plan.resolver.train(plan.resolver.experiments.get(students["cakld"][0])).settings
    return {
        "study": NAME,
        "settings": {
            "task": TASK,
            "metric": METRIC,
            "pretraining": plan.resolver.train(plan.resolver.experiments.get(TEACHER)).settings["recipe"],
            "distillation": {key: value for key, value in recipe["recipe"].items() if key not in ("loss", "lr")},
            "transform": recipe["transform"],
        },
        "share_of_tokens": budget,
        "seeds": given.seeds,
        "valid_loss": valid,
        "lr": chosen,
        "test": {name: _test(folder, name) for name in (TEACHER, RTN, CLIP)},
        "losses": {
            loss: {
                "seeds": [
                    {
                        "test": _test(folder, name),
                        **{key: _trained(folder, plan, name)[key] for key in ("valid_loss", "gamma")},
                    }
                    for name in group
                ]
            }
            for loss, group in students.items()
        },
        "speed": {key: _speed(folder, name) for key, name in timed.items()},
        "digest": pipeline_lib(folder, "digest", *targets),
        **machine(),
    }


def _plan(folder: Path, config: dict[str, Any]) -> Plan:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return Plan.load(str(folder / "config.yaml"))


def _tokens(plan: Plan, name: str) -> int:
    recipe = plan.resolver.train(plan.resolver.experiments.get(name)).settings["recipe"]
    return recipe["steps"] * recipe["global_batch"] * recipe["seq_len"]


def _trained(folder: Path, plan: Plan, name: str) -> dict[str, Any]:
    node = plan.resolver.train(plan.resolver.experiments.get(name))
    return read_json(folder / node.path / "train.json")["result"]


def _arm(folder: Path, name: str, task: str) -> dict[str, Any]:
    result = read_json(folder / "results" / name / f"{task}.json")["result"]
    return result.get("transformed", result["clean"])["metrics"]


def _test(folder: Path, name: str) -> float:
    return float(_arm(folder, name, TASK)[METRIC]["mean"])


def _speed(folder: Path, name: str) -> dict[str, float]:
    return {key: float(figures["mean"]) for key, figures in _arm(folder, name, SPEED).items()}


# -- the page ----------------------------------------------------------------------------------------------------------


def recovery(study: dict[str, Any], perplexity: float) -> float:
    """(ppl_rounded − ppl) / (ppl_rounded − ppl_teacher): 0 as rounded, 1 as the teacher."""
    rounded, teacher = study["test"][RTN], study["test"][TEACHER]
    return (rounded - perplexity) / (rounded - teacher)


def table(study: dict[str, Any]) -> str:
    """What each way to 2 bits costs and recovers, as Markdown."""
    rows = [
        ("teacher, 32 bits", study["test"][TEACHER], None),
        ("2 bits, rounded to nearest", study["test"][RTN], recovery(study, study["test"][RTN])),
        ("2 bits, clipped ranges", study["test"][CLIP], recovery(study, study["test"][CLIP])),
    ]
    lines = ["| weights | byte perplexity | recovered |", "| --- | ---: | ---: |"]
    lines += [f"| {name} | {number(value, 5)} | {_percent(back)} |" for name, value, back in rows]
    for loss, runs in study["losses"].items():
        values = [seed["test"] for seed in runs["seeds"]]
        over, back = summarise(values), summarise([recovery(study, value) for value in values])
        shown = plus_minus(float(over["mean"]), over["stderr"])
        spread = "" if back["stderr"] is None else f" ± {100 * back['stderr']:.1f}"
        lines.append(f"| 2 bits, distilled with {loss} | {shown} | {100 * back['mean']:.1f}{spread} % |")
    return "\n".join(lines)


def derive(study: dict[str, Any]) -> dict[str, str]:
    """The study's page, from its JSON alone."""
    page = PAGE.format(
        seeds=len(study["seeds"]),
        share=f"{100 * study['share_of_tokens']:.1f}",
        table=table(study),
        by_seed=_by_seed(study),
        rates=_rates(study),
        speed=_speeds(study),
        settings=yaml.safe_dump(study["settings"], sort_keys=True, allow_unicode=True),
        where=where(study),
        digest=study["digest"],
    )
    return {"docs/studies/int2.md": page}


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def _by_seed(study: dict[str, Any]) -> str:
    lines = ["| loss | seed | byte perplexity | recovered | gamma |", "| --- | ---: | ---: | ---: | ---: |"]
    for loss, runs in study["losses"].items():
        for seed, one in zip(study["seeds"], runs["seeds"], strict=True):
            gamma = "–" if one["gamma"] is None else number(one["gamma"], 4)
            back = _percent(recovery(study, one["test"]))
            lines.append(f"| {loss} | {seed} | {number(one['test'], 5)} | {back} | {gamma} |")
    return "\n".join(lines) + "\n"


def _rates(study: dict[str, Any]) -> str:
    rates = list(next(iter(study["valid_loss"].values())))
    lines = ["| loss | " + " | ".join(rates) + " |", "| --- |" + " ---: |" * len(rates)]
    for loss, found in study["valid_loss"].items():
        shown = (f"**{number(v, 4)}**" if rate == study["lr"][loss] else number(v, 4) for rate, v in found.items())
        lines.append(f"| {loss} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def _speeds(study: dict[str, Any]) -> str:
    teacher, packed = study["speed"]["teacher"], study["speed"]["int2"]
    lines = ["| | teacher | 2 bits, distilled |", "| --- | ---: | ---: |"]
    return (
        "\n".join(lines + [f"| {key} | {number(teacher[key], 4)} | {number(packed[key], 4)} |" for key in packed])
        + "\n"
    )


PAGE = """# 2-bit weights at `nano`

A model that the pipeline pretrained, its linear layers rounded to 2 bits in groups of 128. Recovered is (perplexity
rounded to nearest − perplexity) / (perplexity rounded to nearest − perplexity of the teacher), all on the test split.
Distillation reads {share} % as many tokens as the pretraining did, padding included; ± is the standard error over
{seeds} training seeds, which share one teacher and its records.

{table}

## Seed by seed

{by_seed}
## Learning rates

The loss on the records kept for validation, at the first seed; the bold one was used. Losses of different names are on
different scales.

{rates}
## Speed and size

Of the task `speed-nano`, on this machine. A model so small says little about one of a billion parameters. (Its peak
memory was then that of the whole process, and is left out.)

{speed}
## Settings

```yaml
{settings}```

{where} The digest of the evaluations and all artifacts behind them is `{digest}`.

`make study-int2` makes the study again; the tests derive this page from `studies/int2.json`.
"""

if __name__ == "__main__":
    seeds = {"type": int, "nargs": "+", "default": [0, 1, 2], "help": "training seeds"}
    rates = {"type": float, "nargs": "+", "default": [3e-4, 1e-3, 3e-3], "help": "learning rates to choose from"}
    main(NAME, __doc__ or "", run, derive, seeds=seeds, rates=rates)
