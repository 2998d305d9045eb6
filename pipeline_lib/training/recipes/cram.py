"""Training under a small, fixed budget: a decoder on next tokens, an encoder on masked ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator

from pipeline_lib.training.settings import Positive, Share, TrainingSettings

if TYPE_CHECKING:
    from pipeline_lib.artifacts.job import Job
    from pipeline_lib.training.hooks import Hooks

ENGINE = "loop"
LAYOUT = "hf"


class Settings(TrainingSettings):
    """AdamW on packed text, from random weights or from another experiment's."""

    type: Literal["cram"] = "cram"
    global_batch: int = Field(1536, gt=0, description="sequences an optimizer step, over all devices and micro-batches")
    seq_len: int = Field(128, ge=2, description="tokens a sequence")
    lr: Positive = Field(1e-3, description="peak learning rate")
    betas: tuple[Share, Share] = Field((0.9, 0.98), description="decay of AdamW's two moments")
    eps: Positive = Field(1e-12, description="AdamW's denominator offset")
    weight_decay: float = Field(0.01, ge=0, description="AdamW's decoupled weight decay, on matrices only")
    max_norm: Positive | None = Field(0.5, description="gradients are scaled down to this global L2 norm; null: never")
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="dtype of the matrix products (autocast; fp16 with loss scaling); weights stay fp32"
    )
    mask_rate: float = Field(0.15, gt=0, lt=1, description="share of tokens an encoder has to predict")
    dropout: Share = Field(0.0, description="dropout probability, also where the model says another")
    methods: tuple[str, ...] = Field((), description="efficient-training methods, in order; none is built yet")

    @field_validator("methods")
    @classmethod
    def _built(cls, methods: tuple[str, ...]) -> tuple[str, ...]:
        if methods:
            raise ValueError(f"methods {', '.join(methods)} are not built yet: leave the list empty")
        return methods


def refuses(model_family: str, transform_types: Sequence[str]) -> str | None:
    """Why this recipe makes no sense for a model and its transforms, or None."""
    return None


def hooks(settings: Settings, job: Job) -> Hooks:
    """Next-token or masked-token loss, after the model's kind."""
    from pipeline_lib.training.masking import CramHooks

    return CramHooks(settings, job)
