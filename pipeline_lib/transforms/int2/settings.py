"""Settings of `int2`. Imports no torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from pipeline_lib.config.base import Settings as Base
from pipeline_lib.transforms.calibration import Calibration
from pipeline_lib.transforms.patterns import SitePatterns, merge

LAYERS: Any = {"linear:*.layer*.*": {}}
"""Every linear layer inside the numbered layers of a llama (`model.layers.…`) or BERT (`bert.encoder.layer.…`)."""

EMBEDDING, HEAD = "embedding:*", "linear:lm_head"
Bits = Literal[16, 8, 4]


class Clip(Calibration):
    """The search for the range of each group, and the text it is done on."""

    tokens: int = Field(default=512, ge=1, description="about how many tokens' inputs of each layer are kept")
    grid: int = Field(
        default=20, ge=1, description="steps between shrinking a side of the range by nothing and to nothing"
    )
    max_shrink: float = Field(
        default=0.5, gt=0, le=1, description="largest share that a side may be shrunk by, exclusive"
    )
    skip: tuple[str, ...] = Field(
        default=("*.q_proj", "*.k_proj", "*.query", "*.key"),
        description="layers that keep their whole range: patterns on their names; [] searches all",
    )


class Settings(Base):
    """Weight-only quantisation in groups."""

    type: Literal["int2"] = "int2"
    format: Literal["int2-asym", "int3-asym", "int4-asym", "int8-asym", "n2f3"] = Field(
        default="int2-asym", description="values a weight can take: integers of 2, 3, 4 or 8 bits, or 3-bit NormalFloat"
    )
    group_size: int = Field(
        default=128, ge=-1, description="consecutive input features that share a scale; -1: the whole row"
    )
    scale_dtype: Literal["float16", "bfloat16", "float32"] = Field(
        default="float16", description="of the stored scales; training rounds them alike, so packing changes nothing"
    )
    clip: Clip | None = Field(default=None, description="clipping ranges from stage `clip`; null: the weights' own")
    embedding: Bits = Field(default=16, description="bits of the embedding: 16 leaves it alone, 8 and 4 quantise it")
    head: Bits = Field(default=16, description="bits of the output layer `lm_head`; of a tied one, as the embedding")
    sites: SitePatterns = LAYERS

    @property
    def random_faults(self) -> bool:
        """Nothing is random: one evaluation is enough."""
        return False

    @model_validator(mode="after")
    def _check(self) -> Settings:
        if self.group_size == 0:
            raise ValueError("group_size must be at least 1, or -1 for the whole row")
        return self

    @model_validator(mode="after")
    def _with_embedding_and_head(self) -> Settings:
        """`embedding` and `head` as patterns, which settings that were written before hold already."""
        given = dict(self.sites)
        for pattern, bits in ((EMBEDDING, self.embedding), (HEAD, self.head)):
            if bits != 16 and pattern not in given:
                given[pattern] = {"format": f"int{bits}-asym", "clip": None}
        object.__setattr__(self, "sites", tuple(given.items()))
        for overrides in given.values():
            if overrides:
                local = merge(self.model_dump(exclude={"sites"}), overrides)
                Settings.model_validate({**local, "embedding": 16, "head": 16, "sites": LAYERS})
        return self
