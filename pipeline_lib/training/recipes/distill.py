"""Quantisation-aware distillation: the transformed model learns the outputs of a full-precision teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from pipeline_lib.training.settings import TrainingSettings

ENGINE = "loop"
LAYOUT = "hf"
NOT_BUILT = "the teacher's losses are not written yet"


class Settings(TrainingSettings):
    """A student under its transform, trained on a teacher's outputs."""

    type: Literal["distill"] = "distill"
    loss: Literal["cakld", "forward", "reverse", "jsd"] = Field(
        "cakld", description="divergence between teacher and student, per token"
    )


def refuses(model_family: str, transform_types: Sequence[str]) -> str | None:
    """Why this recipe makes no sense for a model and its transforms, or None."""
    if model_family == "bert":
        return "teacher and student are decoders: use a llama or a hub decoder"
    return None
