"""Attention sites of Hugging Face models, through the registry of attention functions of transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from pipeline_lib.transforms.attention import AttentionSites
from pipeline_lib.transforms.context import FaultContext

# Beside SDPA, or where the model computes attention by explicit products ("eager").
FUSED, EXPLICIT = "errata_sdpa", "errata_eager"


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function of a model that has attention sites; see `AttentionInterface` for the arguments."""
    sites: AttentionSites | None = getattr(module, "attention_sites", None)
    explicit = cast(Any, module).config._attn_implementation == EXPLICIT
    if sites is not None:
        key, value = sites.read(query, key, value)
        explicit = explicit or sites.is_explicit
    if not explicit:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    sites = sites or _no_sites()
    output, weights = sites.attend(
        query,
        key,
        value,
        mask=attention_mask,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        is_causal=bool(getattr(module, "is_causal", True) if is_causal is None else is_causal),
        dropout=dropout if module.training else 0.0,
    )
    return output.transpose(1, 2).contiguous(), weights


def _no_sites() -> AttentionSites:
    return AttentionSites(FaultContext(0), None, None, None)


for _name in (FUSED, EXPLICIT):
    AttentionInterface.register(_name, _attention)
    AttentionMaskInterface.register(_name, sdpa_mask)


def use_sites(model: PreTrainedModel) -> Callable[[], None]:
    """Let the model's attention go through its sites; returns what undoes it."""
    before = model.config._attn_implementation or "sdpa"
    model.set_attn_implementation(EXPLICIT if before == "eager" else FUSED)
    return lambda: model.set_attn_implementation(before)


def follow_cache(model: PreTrainedModel, context: FaultContext) -> Callable[[], None]:
    """Keep the context's position at what the model's KV cache already holds; returns what undoes it.

    `generate` calls the model once a token, and each token must get the faults it would get in one pass over all.
    """

    def before_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        if cache is None:
            return
        inputs = kwargs.get("inputs_embeds")
        inputs = args[0] if args else kwargs.get("input_ids") if inputs is None else inputs
        context.move(cache.get_seq_length(), None if inputs is None else inputs.shape[1])

    return model.register_forward_pre_hook(before_forward, with_kwargs=True).remove
