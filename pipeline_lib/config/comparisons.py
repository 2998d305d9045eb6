"""Comparisons: an experiment once for every column, arm and seed, and the table over all of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pipeline_lib.config.errors import known
from pipeline_lib.config.load import merge
from pipeline_lib.config.nodes import Node, make_node
from pipeline_lib.config.resolved import Resolved
from pipeline_lib.config.schema import Comparison, Experiment
from pipeline_lib.config.validate import validate

if TYPE_CHECKING:
    from pipeline_lib.config.resolve import Resolver


def comparison(resolver: Resolver, name: str) -> Node:
    """The table of a comparison.

    Its inputs are `train:<column>.<arm>.<seed>` and `result:<column>.<arm>.<seed>.<measure>`, all numbers counted from
    0 in the order of the settings.
    """
    given = resolver.config.comparisons[name]
    where = f"{resolver.file}: comparisons.{name}"
    known(given.experiment, resolver.config.experiments, "experiments", f"{where}.experiment")
    for measure in given.measures:
        known(measure.task, resolver.config.tasks, "tasks", f"{where}.measures")
    inputs: dict[str, Node] = {}
    for place, exp in cells(resolver, name, given, where):
        if exp.recipe_module.ENGINE is not None:
            inputs[f"train:{place}"] = resolver.train(exp)
        for number, measure in enumerate(given.measures):
            inputs[f"result:{place}.{number}"] = resolver.result(exp, measure.task)
    settings: dict[str, Any] = {
        "arms": list(given.arms),
        "columns": list(given.columns),
        **given.model_dump(include={"seeds", "measures", "level"}),
    }
    return make_node("table", name, settings, inputs)


def outline(name: str, given: Comparison) -> str:
    """One line on what a comparison is made of."""
    sizes = len(given.arms), len(given.columns), len(given.seeds)
    cells = sizes[0] * sizes[1] * sizes[2]
    return (
        f"{name}: {sizes[0]} arms ({', '.join(given.arms)}) × {sizes[1]} columns ({'; '.join(given.columns)}) "
        f"× {sizes[2]} seeds = {cells} cells, each measured by {', '.join(one.task for one in given.measures)}"
    )


def cells(resolver: Resolver, name: str, given: Comparison, where: str) -> Iterator[tuple[str, Resolved]]:
    """("<column>.<arm>.<seed>" as numbers, the experiment) of every cell."""
    base = resolver.experiments.get(given.experiment)
    entry = resolver.experiments.entry(given.experiment)
    for c, (column, of_column) in enumerate(given.columns.items()):
        for a, (arm, of_arm) in enumerate(given.arms.items()):
            values = entry.model_dump(by_alias=True, exclude_defaults=True)
            validate(Experiment, of_column, f"{where}.columns.{column}")  # an unknown key is told by its place here
            values = merge(_named(values, base), _named(of_column, base))
            over = _filled(of_arm, _dataset(resolver, values))
            validate(Experiment, over, f"{where}.arms.{arm}")
            values = merge(values, _named(over, base))
            for s, seed in enumerate(given.seeds):
                cell = validate(Experiment, {**values, "seed": seed}, where)
                yield f"{c}.{a}.{s}", resolver.variant(f"{name}.{column}.{arm}.s{seed}", cell)


def _dataset(resolver: Resolver, values: dict[str, Any]) -> str:
    """The dataset of an entry: its own, or its model's."""
    model = resolver.config.models.get(values.get("model", ""))
    return values.get("dataset") or (model and model.dataset) or ""


def _filled(value: Any, dataset: str) -> Any:
    """What an arm changes, with `dataset` where its text says {dataset}."""
    if isinstance(value, dict):
        return {key: _filled(one, dataset) for key, one in value.items()}
    if isinstance(value, list):
        return [_filled(one, dataset) for one in value]
    return value.replace("{dataset}", dataset) if isinstance(value, str) else value


def _named(values: dict[str, Any], base: Resolved) -> dict[str, Any]:
    """An entry whose recipe and transform, where it has any, are mappings that others can be laid over."""
    found = dict(values)
    for key, own in (("recipe", [base.recipe_name]), ("transform", list(base.transform_settings))):
        given = found.get(key)
        if isinstance(given, str):
            found[key] = {part: {} for part in given.split("+")} if key == "transform" else {given: {}}
        elif given is None and own:
            found[key] = {part: {} for part in own}
    return found
