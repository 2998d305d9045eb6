"""The BERT family as Hugging Face models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pipeline_lib.config.models import Bert

if TYPE_CHECKING:
    from transformers import BertConfig, BertForMaskedLM

ARCHITECTURE = "BertForMaskedLM"


def config(model: Mapping[str, Any]) -> BertConfig:
    """The Hugging Face configuration of model settings as they stand in a spec."""
    from transformers import BertConfig

    size = Bert(**{key: value for key, value in model.items() if key in Bert.model_fields})
    return BertConfig(
        vocab_size=model["vocab"],
        hidden_size=size.dim,
        intermediate_size=size.ffn,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        max_position_embeddings=model["max_seq_len"],
        layer_norm_eps=size.norm_eps,
        hidden_act="gelu",
    )


def build(model: Mapping[str, Any]) -> BertForMaskedLM:
    """A BERT with its masked-language-model head and Hugging Face's own initial weights, fp32."""
    from transformers import BertForMaskedLM

    return BertForMaskedLM(config(model))
