"""Pretraining from random weights, or onwards from another experiment's, with torchtitan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from pipeline_lib.training.settings import Positive, Share, TrainingSettings, budget_or

ENGINE = "titan"
FAMILIES = ("llama",)
BUILDS_MODEL = True
"""torchtitan builds the model itself, of given dimensions."""
TOKENS_PER_PARAMETER = 22.0


class Settings(TrainingSettings):
    """AdamW on the mean cross entropy of the next token, linear warm-up, then decay.

    The budget is one of `steps`, `tokens` and `tokens_per_parameter`, and 22 tokens per parameter when none is set.
    """

    default_warmup_fraction: ClassVar[float] = 0.2

    type: Literal["pretrain"] = "pretrain"
    global_batch: int = Field(96, gt=0, description="sequences an optimizer step, over all devices and micro-batches")
    seq_len: int = Field(2048, ge=2, multiple_of=2, description="tokens a sequence; even")
    lr: Positive = Field(1e-4, description="peak learning rate")
    betas: tuple[Share, Share] = Field((0.9, 0.95), description="decay of AdamW's two moments")
    weight_decay: float = Field(0.1, ge=0, description="AdamW's decoupled weight decay, on all parameters")
    max_norm: Positive = Field(1.0, description="gradients are scaled down to this global L2 norm")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="dtype of weights and activations in the forward pass; master weights and sums stay fp32"
    )

    @model_validator(mode="before")
    @classmethod
    def _budget(cls, given: Any) -> Any:
        return budget_or(given, TOKENS_PER_PARAMETER) if isinstance(given, dict) else given


def refuses(model_family: str, transform_types: Sequence[str]) -> str | None:
    """Why this recipe makes no sense for a model and its transforms, or None."""
    if model_family not in FAMILIES:
        return f"torchtitan pretrains decoders of the family {FAMILIES[0]}, not {model_family}: use cram"
    return None
