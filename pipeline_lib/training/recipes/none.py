"""No training: evaluation of weights that are there already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pipeline_lib.config.base import Settings as Base

ENGINE = None


class Settings(Base):
    """Nothing to set."""

    type: Literal["none"] = "none"


def refuses(model_family: str, transform_types: Sequence[str]) -> str | None:
    """Why this recipe makes no sense for a model and its transforms, or None."""
    return None
