"""Nodes of the stage `clip`: a transform that declares a calibration is calibrated on the weights it meets first.

A transform's module declares it by a function `calibration(settings)`, which gives a
`transforms.calibration.Calibration` or None.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipeline_lib.config.errors import UserError, known
from pipeline_lib.config.nodes import Node, make_node
from pipeline_lib.config.registry import TRANSFORMS

if TYPE_CHECKING:
    from pipeline_lib.config.experiments import Resolved
    from pipeline_lib.config.resolve import Resolver


def of_training(resolver: Resolver, exp: Resolved, init: Node, records: Node | None) -> dict[str, Node]:
    """{"clip": the calibration that a training starts with}, or nothing.

    Nothing, too, where the weights were trained under that transform already: their ranges are their own.

    Args:
        init: the weights it starts from.
        records: what its teacher wrote, the default text.
    """
    base = resolver.experiments.get(exp.from_) if exp.from_ else None
    while base is not None and base.recipe_module.ENGINE is None:
        base = resolver.experiments.get(base.from_) if base.from_ else None
    if base is not None and _calibrated(exp) <= _calibrated(base):
        return {}
    return _clip(resolver, exp, init, records)


def of_checkpoint(resolver: Resolver, exp: Resolved, init: Node) -> Node:
    """The checkpoint that an experiment without training is evaluated from: `init`, calibrated where need be."""
    base = resolver.experiments.get(exp.from_) if exp.from_ else None
    if base is not None and _calibrated(exp) <= _calibrated(base):
        return init  # the state that the transform needs came with the weights
    found = _clip(resolver, exp, init, None)
    if not found:
        return init
    settings = {"transform": found["clip"].settings["transform"], "dtype": exp.model.dtype, "layout": "hf"}
    inputs = {"init": init, **found, "tokenizer": resolver.model_tokenizer(exp)}
    return make_node("convert", found["clip"].label, settings, inputs, resolver.execution(exp))


def _clip(resolver: Resolver, exp: Resolved, init: Node, records: Node | None) -> dict[str, Node]:
    found = [(entry, how) for entry in exp.transform_settings.values() if (how := _calibration(entry)) is not None]
    if not found:
        return {}
    where = f"{resolver.experiments.where(exp.name)}.transform"
    if len(found) > 1:
        raise UserError(
            "two transforms of a composition want a calibration",
            where=where,
            value=list(exp.transform_settings),
            fix="switch one off",
        )
    [(entry, how)] = found
    name = how.dataset or (None if records else exp.dataset)
    text = records
    if name is not None:
        text = resolver.dataset(known(name, resolver.config.datasets, "datasets", where))
    if text is None:
        raise UserError(
            "the calibration has no text",
            where=where,
            allowed=list(resolver.config.datasets),
            fix="give the experiment a `dataset`, or the calibration one of its own",
        )
    inputs = {"init": init, "tokenizer": resolver.model_tokenizer(exp), "text": text}
    settings = {"transform": [entry.semantic()]}
    return {"clip": make_node("clip", f"{entry.type}-{init.label}", settings, inputs, resolver.execution(exp))}  # type: ignore[attr-defined]


def _calibration(settings: Any) -> Any:
    module = TRANSFORMS.load(settings.type)
    return module.calibration(settings) if hasattr(module, "calibration") else None


def _calibrated(exp: Resolved) -> set[str]:
    """The types of an experiment's transforms that are calibrated."""
    entries: list[Any] = list(exp.transform_settings.values())
    return {entry.type for entry in entries if _calibration(entry) is not None}
