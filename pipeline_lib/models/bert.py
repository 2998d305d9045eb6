"""The BERT family as Hugging Face models: BERT itself, and the crammed BERT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pipeline_lib.config.models import Bert

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

ARCHITECTURE = "BertForMaskedLM"
CRAMMED = "CrammedBertForMaskedLM"


def architecture(model: Mapping[str, Any]) -> str:
    """The class of model settings as they stand in a spec."""
    return CRAMMED if model.get("crammed") else ARCHITECTURE


def config(model: Mapping[str, Any]) -> PreTrainedConfig:
    """The Hugging Face configuration of model settings as they stand in a spec."""
    from transformers import BertConfig

    size = Bert(**{key: value for key, value in model.items() if key in Bert.model_fields})
    same: dict[str, Any] = {
        "vocab_size": model["vocab"],
        "hidden_size": size.dim,
        "intermediate_size": size.ffn,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "max_position_embeddings": model["max_seq_len"],
        "layer_norm_eps": size.norm_eps,
    }
    if size.crammed:
        from pipeline_lib.models.crammed_bert import CrammedBertConfig

        return CrammedBertConfig(**same)
    return BertConfig(**same, hidden_act="gelu")


def build(model: Mapping[str, Any]) -> PreTrainedModel:
    """A BERT with its masked-language-model head and Hugging Face's own initial weights, fp32."""
    if model.get("crammed"):
        from pipeline_lib.models.crammed_bert import CrammedBertForMaskedLM

        return CrammedBertForMaskedLM(config(model))  # type: ignore[arg-type]
    from transformers import BertForMaskedLM

    return BertForMaskedLM(config(model))  # type: ignore[arg-type]
