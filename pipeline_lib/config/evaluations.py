"""Nodes of the stage `evaluate`: a checkpoint under a transform at a task."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipeline_lib.config.errors import UserError, known
from pipeline_lib.config.labels import task_label, transform_label
from pipeline_lib.config.nodes import Node, make_node

if TYPE_CHECKING:
    from pipeline_lib.config.experiments import Resolved
    from pipeline_lib.config.resolve import Resolver


def arm(resolver: Resolver, exp: Resolved, task: str, transform: list[dict[str, Any]], fault_seeds: list[int]) -> Node:
    """One arm of an evaluation: a checkpoint under a transform at a task."""
    module, settings = resolver.task(task)
    refusal = module.refuses(settings, exp.family)
    if refusal:
        raise UserError(
            f"task {task} cannot evaluate model {exp.model_name}: {refusal}",
            where=f"{resolver.file}: tasks.{task}",
            value=exp.name,
            fix="choose another task or model",
        )
    checkpoint = resolver.checkpoint(exp)
    inputs = {"checkpoint": checkpoint}
    name = getattr(settings, "dataset", None)
    if name is None and getattr(module, "TAKES_DATASET", False):
        name = resolver.dataset_of(exp)
    if name is not None:
        known(name, resolver.config.datasets, "datasets", f"{resolver.file}: tasks.{task}.dataset")
        inputs["dataset"] = resolver.dataset(name)
    for index, need in enumerate(module.needs(settings)):
        inputs[f"asset-{index}"] = _needed(resolver, need)
    if transform and getattr(module, "REFERENCE", False):
        inputs["clean"] = arm(resolver, exp, task, [], [])
    spec = {
        "task": {**settings.semantic()},
        "transform": transform,
        "fault_seeds": fault_seeds,
        "seed": 0,
        "dtype": exp.model.dtype,
    }
    label = f"{checkpoint.label}-{task_label(settings.semantic())}-{transform_label(transform)}"
    return make_node("evaluate", label, spec, inputs, resolver.execution(exp))


def _needed(resolver: Resolver, need: dict[str, Any]) -> Node:
    """The asset that a task asks for: a file from the web by its SHA-256, or files of a hub repository."""
    if "url" in need:
        return make_node("assets", need["name"], {"kind": "url", **need}, {})
    kind = need.get("repo_type", "dataset")
    return resolver.asset(need["repo"], need.get("revision", "main"), need.get("patterns"), kind)
