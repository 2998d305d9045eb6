"""The mistral family as Hugging Face models: a llama's parts under Mistral's names, attention over all positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pipeline_lib.models import llama

if TYPE_CHECKING:
    from transformers import MistralConfig, MistralForCausalLM

ARCHITECTURE = "MistralForCausalLM"


def config(model: Mapping[str, Any]) -> MistralConfig:
    """The Hugging Face configuration of model settings as they stand in a spec; without a sliding window."""
    from transformers import MistralConfig

    same = llama.config(model).to_dict()
    own = {key: value for key, value in same.items() if key not in ("model_type", "attention_bias", "mlp_bias")}
    return MistralConfig(**own, sliding_window=None)


def build(model: Mapping[str, Any]) -> MistralForCausalLM:
    """A mistral with Hugging Face's own initial weights, fp32, on the current default device (meta included)."""
    from transformers import MistralForCausalLM

    return MistralForCausalLM(config(model))
