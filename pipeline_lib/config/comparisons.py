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


def cells(resolver: Resolver, name: str, given: Comparison, where: str) -> Iterator[tuple[str, Resolved]]:
    """("<column>.<arm>.<seed>" as numbers, the experiment) of every cell."""
    base = resolver.experiments.get(given.experiment)
    entry = resolver.experiments.entry(given.experiment)
    for c, (column, of_column) in enumerate(given.columns.items()):
        for a, (arm, of_arm) in enumerate(given.arms.items()):
            values = entry.model_dump(by_alias=True, exclude_defaults=True)
            for over, place in ((of_column, f"{where}.columns.{column}"), (of_arm, f"{where}.arms.{arm}")):
                validate(Experiment, over, place)  # an unknown key is told by its place here
                values = merge(_named(values, base), _named(over, base))
            for s, seed in enumerate(given.seeds):
                cell = validate(Experiment, {**values, "seed": seed}, where)
                yield f"{c}.{a}.{s}", resolver.variant(f"{name}.{column}.{arm}.s{seed}", cell)


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
