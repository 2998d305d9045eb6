"""The sites of a model, under their canonical names."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from pipeline_lib.transforms.base import Site

QUERY_KEY, ATTENTION_VALUE, KV = "query_key", "attention_value", "kv"
ONE_INPUT = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"))
"""Linear layers beside each other that read the same tensor: the first argument of the module around them."""
INNER_ATTENTION = "ScaledDotProductAttentionWrapper"  # torchtitan's, known by name: it need not be installed here


@dataclass(frozen=True)
class Found:
    """A site and the module that holds it."""

    site: Site
    module: nn.Module


def find_sites(model: nn.Module, canonical: Callable[[str], str] | None = None) -> list[Found]:
    """All sites of a model, in the order of its modules.

    Linear and embedding sites are the modules whose `forward` is that of `nn.Linear` or `nn.Embedding` itself.
    Attention (products and KV) is found in Hugging Face models that use the registry of attention functions and in
    torchtitan models with `attn_type="sdpa"`.

    Args:
        canonical: from a module's path in this model to its path in Hugging Face naming; None if they are the same.
    """
    name_of = canonical or (lambda path: path)
    found: list[Found] = []
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
            found.append(Found(Site("linear", name_of(path), tuple(module.weight.shape)), module))
        elif isinstance(module, nn.Embedding) and type(module).forward is nn.Embedding.forward:
            found.append(Found(Site("embedding", name_of(path), tuple(module.weight.shape)), module))
        elif is_inner_attention(module):
            found.extend(_attention(name_of(path).removesuffix(".inner_attention"), module))
        elif is_hugging_face(model) and all(hasattr(module, name) for name in ("is_causal", "scaling", "config")):
            found.extend(_attention(name_of(path), module))
    return found


def out_of_reach(model: nn.Module, found: list[Found]) -> list[str]:
    """Names of the matrices that lie in no site and stay exact under any transform, such as GPT-2's `Conv1D` or the
    fused experts of a mixture."""
    held = {id(p) for at in found if not at.site.kind.startswith(("product", "kv")) for p in at.module.parameters()}
    return [name for name, parameter in model.named_parameters() if parameter.ndim > 1 and id(parameter) not in held]


def is_hugging_face(model: nn.Module) -> bool:
    """Whether this is a model of transformers, which is imported already if it is."""
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


def is_inner_attention(module: nn.Module) -> bool:
    """Whether this is torchtitan's wrapper of scaled dot product attention."""
    return type(module).__name__ == INNER_ATTENTION


def _attention(name: str, module: nn.Module) -> list[Found]:
    return [
        Found(Site("kv", f"{name}.{KV}"), module),
        Found(Site("product", f"{name}.{QUERY_KEY}"), module),
        Found(Site("product", f"{name}.{ATTENTION_VALUE}"), module),
    ]
