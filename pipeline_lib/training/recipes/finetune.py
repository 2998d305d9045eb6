"""Fine-tuning of a checkpoint on next-token prediction, of all weights or of low-rank adapters, in the Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from pipeline_lib.config.base import Settings as Base
from pipeline_lib.config.base import added
from pipeline_lib.training.settings import Positive, TrainingSettings, budget_or
from pipeline_lib.transforms.patterns import IN_LAYERS

if TYPE_CHECKING:
    from pipeline_lib.artifacts.job import Job
    from pipeline_lib.training.hooks import Hooks

ENGINE = "hf"
LAYOUT = "hf"
NEEDS = ("from",)
"""What an experiment must name: `from` (or a hub or local model), `teacher`, `losses`."""
VARIANTS = {"lora": {"method": "lora"}}
"""Name → settings of ways through this recipe that are tested beside the default one."""
TOKENS_PER_PARAMETER = {"full": 0.22, "lora": 0.01}
"""The budget by default, by method: a hundredth of pretraining's 22, and 1 %."""


class Lora(Base):
    """Low-rank adapters: W becomes W + alpha/r · B A, with A [r, in] and B [out, r]."""

    r: int = Field(32, gt=0, description="rank of the update")
    alpha: Positive = Field(32.0, description="the update is scaled by alpha/r")
    targets: tuple[str, ...] = Field(
        (IN_LAYERS,),
        min_length=1,
        description="patterns on the names of linear layers; those that match get adapters, * crosses dots",
    )


class Settings(TrainingSettings):
    """Packed text with AdamW. The budget is 0.22 (full) or 0.01 (lora) tokens per parameter when none is set."""

    type: Literal["finetune"] = "finetune"
    method: Literal["full", "lora"] = Field("full", description="what trains: all weights, or low-rank adapters")
    lora: Lora | None = added(None, "the adapters: {r, alpha, targets}; only with method lora")
    on_divergence: Literal["stop", "keep"] = added(
        "stop",
        "what a training ends in whose loss or gradient is not finite: stop: an error; keep: the weights as they then "
        "are, marked as diverged in train.json and in sweeps, as is one whose loss ends over 1.25 times its first",
    )

    @model_validator(mode="before")
    @classmethod
    def _by_method(cls, given: Any) -> Any:
        method = given.get("method", "full") if isinstance(given, dict) else None
        if method not in TOKENS_PER_PARAMETER:
            return given
        adapters = {"lora": given.get("lora") or {}} if method == "lora" else {}
        return {**budget_or(given, TOKENS_PER_PARAMETER[method]), **adapters}

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.method == "full" and self.lora is not None:
            raise ValueError("`lora` needs method lora: add `method: lora`, or remove it")
        if self.method == "lora" and self.clip_weights is not None:
            raise ValueError(
                "clip_weights changes weights that method lora leaves frozen: use method full, or remove it"
            )
        return self


def refuses(model_family: str, transform_types: Sequence[str]) -> str | None:
    """Why this recipe makes no sense for a model and its transforms, or None."""
    if model_family == "bert":
        return "it trains next-token prediction, an encoder such as bert sees the next token: use cram"
    return None


def hooks(settings: Settings, job: Job) -> Hooks:
    """Next-token loss on packed text; the Trainer does the rest.

    Raises:
        UserError: there is nothing to fine-tune.
    """
    from pipeline_lib.config.errors import UserError
    from pipeline_lib.training.hooks import Hooks
    from pipeline_lib.training.lora import LoraHooks

    if "init" not in job.inputs:
        raise UserError(
            "fine-tuning needs weights to start from",
            where=job.label,
            fix="use a hub or local model or `from: <experiment>`; to train from random weights use pretrain or cram",
        )
    return LoraHooks(settings, job) if settings.method == "lora" else Hooks(settings, job.settings["seed"])
