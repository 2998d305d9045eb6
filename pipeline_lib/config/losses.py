"""Nodes of the stage `score`: the loss of every training sequence, under another experiment's model or imported."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pipeline_lib.config.errors import UserError
from pipeline_lib.config.hashes import file_hashes
from pipeline_lib.config.nodes import Node, make_node

if TYPE_CHECKING:
    from pipeline_lib.config.experiments import Resolved
    from pipeline_lib.config.resolve import Resolver

FILES = ("losses.safetensors", "score.json")


def of_sequences(resolver: Resolver, exp: Resolved, tokens: Node, seq_len: int) -> Node:
    """The losses of the sequences that an experiment is trained on.

    Raises:
        UserError: the model behind them has a transform, another tokenizer, or was trained on these very sequences; or
            the folder of imported losses is none.
    """
    assert exp.losses is not None
    where = f"{resolver.experiments.where(exp.name)}.losses"
    if not isinstance(exp.losses, str):
        _refuse_matched_masks(exp, where)
        inputs = {"imported": _imported(exp.losses.folder, f"{where}.folder"), "tokens": tokens}
        settings = {"seq_len": seq_len}
        return make_node("score", f"imported-{tokens.label}", settings, inputs, resolver.execution(exp))
    other = resolver.experiments.get(exp.losses)
    _refuse(resolver, exp, other, where)
    checkpoint = resolver.checkpoint(other)
    settings = {"seq_len": seq_len, "masks": None, "dtype": other.model.dtype}
    if exp.family == "bert":
        # The same for every seed of the experiment that uses them: one holdout model serves all.
        settings["masks"] = {"seed": other.seed, "rate": exp.recipe.mask_rate}  # type: ignore[attr-defined]
    inputs = {"model": checkpoint, "tokenizer": resolver.model_tokenizer(exp), "tokens": tokens}
    return make_node("score", f"{checkpoint.label}-{tokens.label}", settings, inputs, resolver.execution(exp))


def _refuse_matched_masks(exp: Resolved, where: str) -> None:
    for method in getattr(exp.recipe, "methods", ()):
        if exp.family == "bert" and getattr(method, "masks", None) == "matched":
            raise UserError(
                "nobody knows the masks that imported losses were measured with",
                where=where,
                value=f"{method.type}: {{masks: matched}}",
                allowed="masks: fresh",
                fix=f"set `{method.type}: {{masks: fresh}}`",
            )


def _refuse(resolver: Resolver, exp: Resolved, other: Resolved, where: str) -> None:
    if other.transform:
        raise UserError(
            "losses are computed exactly, and this experiment has a transform",
            where=where,
            value=other.name,
            fix="name a plain experiment; for these weights in exact arithmetic add one with "
            f"`from: {other.name}` and `transform: plain`",
        )
    if other.family != exp.family:
        raise UserError(
            "an encoder's losses mean nothing to a decoder, nor the other way round",
            where=where,
            value=f"{other.name} ({other.family})",
            allowed=f"an experiment with a model of the family {exp.family}",
            fix="train the model behind the losses like this one",
        )
    own, its = resolver.model_tokenizer(exp), resolver.model_tokenizer(other)
    if own.fingerprint != its.fingerprint:
        raise UserError(
            "the model behind the losses reads another tokenizer's tokens",
            where=where,
            value=f"{other.name}: {its.id}",
            allowed=own.id,
            fix="give both models the same tokenizer",
        )
    own_text = resolver.dataset(resolver.dataset_of(exp)).fingerprint
    trained = _training(resolver, other)
    while trained is not None:
        same = trained.dataset is not None and resolver.dataset(trained.dataset).fingerprint == own_text
        if same and getattr(trained.recipe, "split", "train") == "train":
            raise UserError(
                "the model behind the losses was trained on the sequences that it is to judge, "
                "so its losses are not irreducible",
                where=where,
                value=trained.name,
                allowed="an experiment trained on the dataset's holdout",
                fix=f"give {trained.name} the recipe cram with `split: holdout`, or another dataset",
            )
        trained = _training(resolver, resolver.experiments.get(trained.from_)) if trained.from_ else None


def _training(resolver: Resolver, exp: Resolved) -> Resolved | None:
    """The experiment that trained the weights of `exp`: itself, or one that it starts from; None for a hub model."""
    while exp.recipe_module.ENGINE is None:
        if exp.from_ is None:
            return None
        exp = resolver.experiments.get(exp.from_)
    return exp


def _imported(folder: str, where: str) -> Node:
    """What `import-losses` wrote, known by its content; where it lies is no part of what it is."""
    path = Path(folder).expanduser()
    if not all((path / name).is_file() for name in FILES):
        raise UserError(
            "no imported losses in the folder",
            where=where,
            value=folder,
            allowed=f"a folder with {' and '.join(FILES)}",
            fix="make it with `python -m pipeline_lib import-losses`; an experiment's losses are `losses: <name>`",
        )
    files = file_hashes({name: path / name for name in FILES})
    return make_node("assets", "losses", {"kind": "local", "files": files}, {}, {"path": str(path.absolute())})
