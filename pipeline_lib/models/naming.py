"""One set of names for the parts of a llama, whoever built it. Imports no torch.

The canonical name of a module or parameter is its path in the Hugging Face model, for example
`model.layers.3.mlp.gate_proj.weight`. torchtitan calls the same part `layers.3.feed_forward.w1.weight`.
Errata's torchtitan llama rotates query and key halves as Hugging Face does, so that the two differ in
names only: no weight, scale or fault mask has to be permuted between training and evaluation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

Value = TypeVar("Value")

_TOP = {"tok_embeddings": "model.embed_tokens", "layers": "model.layers", "norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attention": "self_attn",
    "feed_forward": "mlp",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_PART = {
    "attention": {"wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj"},
    "feed_forward": {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"},
}
# Put into the path by activation checkpointing and torch.compile; they hold no name of their own.
_WRAPPERS = frozenset({"_checkpoint_wrapped_module", "_orig_mod"})

_TOP_BACK = {canonical: titan for titan, canonical in _TOP.items()}
_BLOCK_BACK = {canonical: titan for titan, canonical in _BLOCK.items()}
_PART_BACK = {block: {canonical: titan for titan, canonical in parts.items()} for block, parts in _PART.items()}

_ADDED = re.compile(r"(^|\.)transform\.((query_key|attention_value|kv)\.)?(store|compute|fault\d+)\.")


def canonical_titan(name: str) -> str:
    """The canonical name of a module, parameter or buffer of a torchtitan llama.

    What follows a known part is kept (`.weight`, `.transform.scale`). torchtitan's `inner_attention`,
    which has no module of its own in Hugging Face models, bears the name of the attention around it.

    Raises:
        ValueError: no llama of torchtitan has a part of that name.
    """
    head, *rest = (part for part in name.split(".") if part not in _WRAPPERS)
    if head not in _TOP:
        raise ValueError(f"{name!r} is no part of a torchtitan llama")
    parts = [_TOP[head]]
    if head == "layers" and len(rest) > 1:
        number, block, *inner = rest
        parts += [number, _BLOCK.get(block, block)]
        rest = [part for part in inner if part != "inner_attention"]
        if rest:
            rest[0] = _PART.get(block, {}).get(rest[0], rest[0])
    return ".".join(parts + rest)


def titan_name(canonical: str) -> str:
    """The inverse of `canonical_titan`, for parameters and the modules that hold them.

    Raises:
        ValueError: not a canonical name of a llama.
    """
    prefix = next((p for p in _TOP_BACK if f"{canonical}.".startswith(f"{p}.")), None)
    if prefix is None:
        raise ValueError(f"{canonical!r} is no part of a llama")
    titan, rest = _TOP_BACK[prefix], canonical.removeprefix(prefix).split(".")[1:]
    if titan == "layers" and len(rest) > 1:
        rest[1] = _BLOCK_BACK.get(rest[1], rest[1])
        if len(rest) > 2:
            rest[2] = _PART_BACK.get(rest[1], {}).get(rest[2], rest[2])
    return ".".join([titan, *rest])


def to_canonical(state: Mapping[str, Value]) -> dict[str, Value]:
    """A state dict of torchtitan's names under canonical names, sorted by them."""
    renamed = {canonical_titan(name): value for name, value in state.items()}
    return {name: renamed[name] for name in sorted(renamed)}


def from_canonical(state: Mapping[str, Value]) -> dict[str, Value]:
    """A state dict of canonical names under torchtitan's names."""
    return {titan_name(name): value for name, value in state.items()}


def split_transform(state: Mapping[str, Value]) -> tuple[dict[str, Value], dict[str, Value]]:
    """(weights of the model itself, what transforms added under `<module>.transform.*`)."""
    own = {name: value for name, value in state.items() if not is_transform_state(name)}
    return own, {name: value for name, value in state.items() if is_transform_state(name)}


ADAPTER = "low_rank"
"""The attribute under which a layer holds a low-rank adapter."""


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return f".{ADAPTER}." in f".{name}"


def is_transform_state(name: str) -> bool:
    """Whether a parameter or buffer was added by a transform.

    What follows `transform` tells it from a model's own part of that name (BERT's head has one): store, compute,
    fault and its number; in attention after the name of the site.
    """
    return _ADDED.search(name) is not None
