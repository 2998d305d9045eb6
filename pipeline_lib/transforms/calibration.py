"""What a transform that is calibrated says of its calibration. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline_lib.config.base import Settings


class Calibration(Settings):
    """The text over which stage `clip` runs the exact model.

    A transform's module has `calibration(settings)`, which gives one of these or None.
    """

    dataset: str | None = Field(
        default=None,
        description="dataset in config.yaml; null: the teacher's records if the experiment has a teacher, else the "
        "dataset it is trained on",
    )
    columns: tuple[str, ...] = Field(
        default=(), description="further columns of the dataset, put below the text of each document"
    )
    samples: int = Field(default=128, ge=1, description="texts, the first of the dataset in seeded order")
    max_tokens: int = Field(default=512, ge=1, description="tokens above which a text is long")
    long: Literal["cut", "skip"] = Field(default="cut", description="what happens to long texts")
    sequence: int = Field(
        default=1024, ge=1, description="tokens of a forward pass; at most the positions that the model has"
    )
    seed: int = Field(default=42, description="of the order of texts")
