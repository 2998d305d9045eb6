"""Training through low-rank updates that are merged into the weights again and again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from pipeline_lib.training.settings import TrainingSettings

ENGINE = "loop"
LAYOUT = "hf"
NOT_BUILT = "merging low-rank updates into the weights is not written yet"


class Settings(TrainingSettings):
    """A rank-limited update of every linear, merged every `reset_every` steps."""

    type: Literal["relora"] = "relora"
    rank: int = Field(128, gt=0, description="rank of the update")
    reset_every: int = Field(1000, gt=0, description="optimizer steps between merges")
    reset_warmup: int = Field(100, ge=0, description="optimizer steps of warm-up after each merge")


def refuses(model_family: str, transform_types: Sequence[str]) -> str | None:
    """Why this recipe makes no sense for a model and its transforms, or None."""
    if model_family == "bert":
        return "its low-rank updates are defined for decoders: use a llama"
    return None
