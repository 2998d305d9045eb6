"""Fine-tuning of a checkpoint on next-token prediction, with the transformers Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator

from pipeline_lib.training.settings import TrainingSettings

if TYPE_CHECKING:
    from pipeline_lib.artifacts.job import Job
    from pipeline_lib.training.hooks import Hooks

ENGINE = "hf"
LAYOUT = "hf"
NEEDS = ("from",)
"""What an experiment must name: `from` (or a hub model), `teacher`, `losses`."""


class Settings(TrainingSettings):
    """All weights train, on packed text, with AdamW."""

    type: Literal["finetune"] = "finetune"
    method: Literal["full", "lora"] = Field("full", description="which weights train; lora is not built yet")

    @field_validator("method")
    @classmethod
    def _built(cls, method: str) -> str:
        if method == "lora":
            raise ValueError("method lora is not built yet: use full")
        return method


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

    if "init" not in job.inputs:
        raise UserError(
            "fine-tuning needs weights to start from",
            where=job.label,
            fix="use a hub model or `from: <experiment>`; to train from random weights use pretrain or cram",
        )
    return Hooks(settings, job.settings["seed"])
