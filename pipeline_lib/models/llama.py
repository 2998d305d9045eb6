"""The llama family as Hugging Face models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pipeline_lib.config.models import Llama

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM

ARCHITECTURE = "LlamaForCausalLM"


def config(model: Mapping[str, Any]) -> LlamaConfig:
    """The Hugging Face configuration of model settings as they stand in a spec.

    Rotary positions are plain, of base `rope_theta`: no scaling of any kind.
    """
    from transformers import LlamaConfig

    size = Llama(**{key: value for key, value in model.items() if key in Llama.model_fields and key != "family"})
    return LlamaConfig(
        vocab_size=model["vocab"],
        hidden_size=size.dim,
        intermediate_size=size.ffn,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.dim // size.heads,
        max_position_embeddings=model["max_seq_len"],
        rms_norm_eps=size.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": size.rope_theta},
        tie_word_embeddings=False,
        attention_bias=False,
        mlp_bias=False,
        attention_dropout=0.0,
        hidden_act="silu",
        # Token ids belong to the tokenizer; `save_checkpoint` sets them.
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def build(model: Mapping[str, Any]) -> LlamaForCausalLM:
    """A llama with Hugging Face's own initial weights, fp32, on the current default device (meta included)."""
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM(config(model))
