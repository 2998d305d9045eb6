"""Nodes of the stage `timing`: how fast this machine is at the passes that an experiment can make."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipeline_lib.config.errors import UserError
from pipeline_lib.config.labels import weights_label
from pipeline_lib.config.nodes import Node, make_node

if TYPE_CHECKING:
    from pipeline_lib.config.experiments import Resolved
    from pipeline_lib.config.resolve import Resolver

READS = ("type", "global_batch", "seq_len", "precision", "mask_rate", "dropout", "fault_devices")
"""Settings of the recipe that its speed depends on; those that only change what it learns are not among them."""


def of_experiment(resolver: Resolver, exp: Resolved) -> Node:
    """The times of an experiment's passes; experiments that differ in methods, budget or seed share them.

    Raises:
        UserError: the recipe has no budget that times are for.
    """
    if not hasattr(exp.recipe, "budget"):
        raise UserError(
            f"recipe {exp.recipe_name} counts no work, so there is nothing to time",
            where=f"{resolver.experiments.where(exp.name)}.recipe",
            value=exp.recipe_name,
            allowed="recipe cram",
            fix="ask for the timing of an experiment with recipe cram",
        )
    recipe = exp.recipe.semantic()
    model = resolver.architecture(exp, recipe["seq_len"])
    inputs = {"tokenizer": resolver.model_tokenizer(exp)}
    if exp.model.trained is not None:
        inputs["init"] = resolver.model_files(exp.model_name)
    settings: dict[str, Any] = {"model": model, "transform": exp.transform}
    settings["recipe"] = {key: recipe[key] for key in READS}
    return make_node("timing", weights_label(settings), settings, inputs, resolver.execution(exp))
