"""Nodes of the stage `teacher`: what an experiment's teacher is asked, and which weights answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline_lib.config.errors import UserError, known
from pipeline_lib.config.nodes import Node, make_node

if TYPE_CHECKING:
    from pipeline_lib.config.experiments import Resolved
    from pipeline_lib.config.resolve import Resolver


def records(resolver: Resolver, exp: Resolved) -> Node:
    """The records of an experiment's teacher: its answers to the prompts that the recipe's `data` names.

    Raises:
        UserError: the recipe reads no teacher, or the teacher has no weights or a transform.
    """
    where = f"{resolver.experiments.where(exp.name)}.recipe.{exp.recipe_name}"
    data = getattr(exp.recipe, "data", None)
    if data is None:
        raise UserError(
            f"recipe {exp.recipe_name} reads no teacher",
            where=f"{resolver.experiments.where(exp.name)}.teacher",
            value=exp.teacher,
            fix="remove `teacher`, or use recipe distill",
        )
    entries = [entry.semantic() for entry in data.entries]
    names = {entry["dataset"] or resolver.dataset_of(exp): None for entry in entries}
    for name in names:
        known(name, resolver.config.datasets, "datasets", f"{where}.data.prompts.dataset")
    model, dtype = _model(resolver, exp)
    inputs = {"model": model, **{f"dataset-{i}": resolver.dataset(name) for i, name in enumerate(names)}}
    # Under the names of config.yaml, equal work would have other fingerprints.
    labels = {name: f"{resolver.dataset(name).label}-{index}" for index, name in enumerate(names)}
    entries = [{**entry, "dataset": labels[entry["dataset"] or resolver.dataset_of(exp)]} for entry in entries]
    settings = {**data.semantic(), "prompts": entries}
    label = f"{inputs['dataset-0'].label}-{model.label}"
    return make_node("teacher", label, {"data": settings, "dtype": dtype}, inputs, resolver.execution(exp))


def _model(resolver: Resolver, exp: Resolved) -> tuple[Node, str]:
    """(checkpoint, dtype) of an experiment's teacher.

    Raises:
        UserError: it names a model without weights, or an experiment under a transform.
    """
    assert exp.teacher is not None
    where = f"{resolver.experiments.where(exp.name)}.teacher"
    if exp.teacher in resolver.config.models:
        model = resolver.config.models[exp.teacher]
        if model.trained is None:
            raise UserError(
                "a model of dimensions has no weights to teach with",
                where=where,
                value=exp.teacher,
                allowed="an experiment, or a hub or local model",
                fix=f"train one first, e.g. teacher: plain-{exp.teacher}",
            )
        return resolver.model_files(exp.teacher), model.dtype
    teacher = resolver.experiments.get(exp.teacher)
    if teacher.transform:
        raise UserError(
            "a teacher computes exactly, and this one has a transform",
            where=where,
            value=exp.teacher,
            fix="name a plain experiment; for these weights in exact arithmetic add one with "
            f"`from: {exp.teacher}` and `transform: plain`",
        )
    return resolver.checkpoint(teacher), teacher.model.dtype
