"""One HTML file that holds everything: text, tables, plots, style. No script, no request."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pipeline_lib.reporting.budget_curves import panels, unit_of
from pipeline_lib.reporting.collect import Collected, Compared, Result, Training
from pipeline_lib.reporting.comparison import WORK
from pipeline_lib.reporting.numbers import Measured, count, label, main_metric, number
from pipeline_lib.reporting.plots import Picture, metric_bars, training_curves
from pipeline_lib.reporting.sweep_plots import sweep_pictures
from pipeline_lib.reporting.switches import as_published


def draw(collected: Collected) -> dict[str, list[Picture]]:
    """All plots: `training`, `task:<task>`, `sweep:<name>`, `comparison:<name>`."""
    pictures: dict[str, list[Picture]] = {}
    for unit in ("tokens", "steps"):
        curves = {name: t.curve for name, t in collected.trainings.items() if t.unit == unit and len(t.curve) > 1}
        if curves:
            pictures["training"] = [training_curves(curves, unit)]
            break
    for task, results in collected.tasks().items():
        metric = main_metric(results[0].metrics(), collected.favourites)
        arms = {result.experiment: result.measured(metric) for result in results}
        pictures[f"task:{task}"] = [metric_bars(metric, arms, f"task-{task}")]
    for name, table in collected.sweeps.items():
        metric = table.main_metric(collected.favourites)
        pictures[f"sweep:{name}"] = sweep_pictures(table, metric, f"sweep-{name}")
    for name, compared in collected.comparisons.items():
        if compared.curves:
            unit = unit_of(cell.work for cell in compared.made.cells)
            pictures[f"comparison:{name}"] = [panels(compared.curves, unit, f"comparison-{name}")]
    return pictures


def render(collected: Collected, pictures: dict[str, list[Picture]]) -> str:
    """The page. Every name in it is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, count=count, compact=_compact, label=label, ratio=_ratio)
    template = environment.get_template("report.html.j2")
    return template.render(
        data=collected,
        tiles=_tiles(collected),
        experiments=[_experiment(collected, name) for name in collected.experiments],
        comparisons={name: _comparison(compared) for name, compared in collected.comparisons.items()},
        tasks={task: _task(results, collected.favourites) for task, results in collected.tasks().items()},
        pictures={key: [(Markup(p.inline), p.caption) for p in found] for key, found in pictures.items()},
        provenance=[_provenance(result) for result in collected.results],
        isfinite=math.isfinite,
    )


def _tiles(collected: Collected) -> list[tuple[str, str]]:
    trained = {t.fingerprint or name: t.result.get("tokens", 0) for name, t in collected.trainings.items()}
    tiles = [(str(len(collected.experiments)), "experiments"), (str(len(collected.results)), "results")]
    if trained:
        tiles.append((count(sum(trained.values())), "tokens trained on"))
    if collected.sweeps:
        tiles.append((str(sum(len(sweep.points) for sweep in collected.sweeps.values())), "sweep points"))
    return tiles


def _experiment(collected: Collected, name: str) -> dict[str, Any]:
    training, base = collected.trainings.get(name), None
    if training is None:
        base = next((other for other in collected.trainings.values() if other.artifact in collected.behind(name)), None)
    shown = training or base
    return {
        "name": name,
        "base": base.experiment if base else None,
        "transform": collected.transforms.get(name) or (training.settings.get("transform") if training else None) or [],
        "recipe": (training.settings.get("recipe") or {}).get("type", "—") if training else "none",
        "model": _model(shown),
        "parameters": shown.result.get("parameters") if shown else None,
        "tokens": training.result.get("tokens") if training else None,
        "loss": training.result.get("final_train_loss") if training else None,
    }


def _model(training: Training | None) -> str:
    model = training.settings.get("model") if training else None
    if not model:
        return "—"
    if model["family"] == "hub":
        return model["repo"]
    if model["family"] == "local":
        return f"local {model['content'][:6]}"
    return f"{model['family']} {model['layers']} × {model['dim']}"


def _comparison(compared: Compared) -> dict[str, Any]:
    made = compared.made
    measures = []
    for (task, metric), columns in made.groups().items():
        cells = list(columns.values())
        rows = [{"arm": row[0].arm, "cells": row} for row in zip(*cells, strict=True)]
        power = {column: made.power(own) for column, own in columns.items()}
        measures.append({"task": task, "metric": metric, "columns": list(columns), "rows": rows, "power": power})
    first = next(iter(made.groups().values()))
    work = [(column, cell.arm, cell.work) for column, cells in first.items() for cell in cells if cell.work]
    kinds = [kind for kind in WORK if any(kind in figures for *_, figures in work)]
    ran = [
        (whose, switch, value, as_published(switch, value))
        for whose, switches in compared.ran.items()
        for switch, value in switches.items()
    ]
    return {"measures": measures, "seeds": made.seeds, "level": made.level, "work": work, "kinds": kinds, "ran": ran}


def _task(results: list[Result], favourites: list[str]) -> dict[str, Any]:
    metrics = results[0].metrics()
    first = main_metric(metrics, favourites)
    metrics = [first, *(name for name in metrics if name != first)]
    rows: list[dict[str, Any]] = []
    for result in results:
        measured = {name: result.measured(name) for name in metrics if name in result.metrics()}
        rows.append({"experiment": result.experiment, "measured": measured, "arms": list(result.arms)})
    arrows = {True: "lower is better", False: "higher is better", None: ""}
    return {
        "metrics": metrics,
        "directions": {name: arrows[results[0].lower_is_better(name)] for name in metrics},
        "rows": rows,
        "samples": results[0].arms["clean"].get("n_samples"),
    }


def _provenance(result: Result) -> dict[str, Any]:
    own = result.provenance
    arms = own.get("arms", {})
    seconds = {name: sum((arm.get("seconds") or {}).values()) for name, arm in arms.items()}
    hardware = own.get("hardware") or {}
    facts = {
        "fingerprint": result.fingerprint,
        "commit": own.get("commit"),
        "made": own.get("started"),
        "evaluation": ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items()),
        "device": ", ".join(sorted({str(arm.get("device")) for arm in arms.values()})),
        "hardware": ", ".join([str(hardware.get("processor", "")), *hardware.get("gpus", [])]).strip(", "),
        "documents": result.arms["clean"].get("n_samples"),
        "fault seeds": ", ".join(map(str, result.arms.get("transformed", {}).get("fault_seeds", []))),
        "dtype": result.arms["clean"].get("dtype"),
        "versions": ", ".join(f"{name} {version}" for name, version in (own.get("versions") or {}).items()),
    }
    return {
        "experiment": result.experiment,
        "task": result.task,
        "facts": {key: value for key, value in facts.items() if value not in (None, "")},
        "chain": result.chain,
        "replaced": (result.arms.get("transformed", {}).get("transform_report") or {}).get("histogram", {}),
    }


def _compact(settings: dict[str, Any]) -> str:
    """Settings of a transform on one line, without its type and what is null: `weight (p_frac 2⁻¹⁰)`."""
    parts = []
    for key, value in settings.items():
        if key == "type" or value in (None, [], {}, ()):
            continue
        parts.append(f"{key} ({_compact(value)})" if isinstance(value, dict) else f"{key} {label(value)}")
    return ", ".join(parts)


def _ratio(measured: Measured, base: Measured) -> str:
    """`×1.36`, or nothing where there is no ratio."""
    if base.mean == 0 or not math.isfinite(base.mean) or not math.isfinite(measured.mean):
        return ""
    return f"×{number(measured.mean / base.mean, 3)}"
