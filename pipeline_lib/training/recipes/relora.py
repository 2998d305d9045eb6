"""ReLoRA: low-rank updates of frozen weights, merged into them again and again (Lialin et al., 2023, arXiv 2307.05695).

Under a transform that can hold a frozen weight packed (ternary) the base lies on the device as packed codes alone; its
fp32 master weights lie on the host. Everything that has no adapter (embeddings, norms, biases, head) trains as usual.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from pipeline_lib.training.settings import Positive, Share, TrainingSettings

if TYPE_CHECKING:
    from pipeline_lib.artifacts.job import Job
    from pipeline_lib.training.hooks import Hooks

ENGINE = "loop"
LAYOUT = "hf"


class Settings(TrainingSettings):
    """Adapters on the linear layers of the blocks, merged every `reset_every` steps; AdamW."""

    type: Literal["relora"] = "relora"
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="dtype of the matrix products (autocast; fp16 with loss scaling); what trains stays fp32"
    )
    rank: int = Field(128, gt=0, description="rank of the adapters, or the full rank where that is less")
    alpha: Positive | None = Field(None, description="updates are multiplied by alpha/rank; null: by 1")
    adapter_start: Literal["xavier", "orthogonal"] = Field(
        "xavier", description="how the adapters' A is drawn at the start and after each merge; B is 0"
    )
    targets: tuple[str, ...] = Field(
        ("*",), min_length=1, description="patterns on the block linears that adapters go to"
    )
    base: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="dtype of frozen weights on the device, where the transform does not pack them"
    )
    train_rest: bool = Field(True, description="whether what has no adapter (embeddings, norms, biases, head) trains")
    reset_every: int | None = Field(
        1000, gt=0, description="optimizer steps between merges; null: one merge, at the end (LoRA)"
    )
    reset_warmup: int = Field(100, ge=0, description="steps of warm-up after each merge")
    schedule: Literal["jagged", "published"] = Field(
        "jagged",
        description="jagged: each warm-up begins at 1/(reset_warmup + 1); published: as alex4321/bitlinear, "
        "the step that ends in a merge has rate 0, and the first warm-up is multiplied by a second",
    )
    optimizer_reset: Literal["adapters", "all", "pruned"] = Field(
        "adapters",
        description="AdamW's state at a merge: forgotten for the adapters, for all parameters, "
        "or the adapters' moments pruned by magnitude",
    )
    prune: Share = Field(0.99, description="share of the smallest moments set to 0, with optimizer_reset pruned")
    mask_rate: float = Field(0.15, gt=0, lt=1, description="share of tokens an encoder has to predict")
    dropout: Share = Field(0.0, description="dropout probability, also where the model says another")

    @model_validator(mode="after")
    def _warm_up_fits(self) -> Settings:
        if self.reset_every is not None and self.reset_warmup >= self.reset_every:
            raise ValueError(f"reset_warmup {self.reset_warmup} must be less than reset_every {self.reset_every}")
        if self.clip_weights is not None:
            raise ValueError("clip_weights changes weights that relora leaves frozen between merges: remove it")
        if self.schedule == "published" and self.decay != "linear":
            raise ValueError(f"the published schedule decays linearly: decay {self.decay} goes with schedule jagged")
        return self


def refuses(model_family: str, transform_types: Sequence[str]) -> str | None:
    """Why this recipe makes no sense for a model and its transforms, or None."""
    return None


def hooks(settings: Settings, job: Job) -> Hooks:
    """Adapters, merges and restarts."""
    from pipeline_lib.training.relora import ReLoRAHooks

    return ReLoRAHooks(settings, job)
