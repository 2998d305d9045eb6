"""Settings of `ternary`. Imports no torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from pipeline_lib.config.base import Settings as Base
from pipeline_lib.transforms.patterns import SitePatterns, merge

LAYERS: Any = {"*.layer*.*": {}}
"""Everything inside the numbered layers of a llama (`model.layers.…`) or BERT (`bert.encoder.layer.…`)."""


class Settings(Base):
    """Three-valued linear weights; `sites` says where, and may change the grid by layer."""

    type: Literal["ternary"] = "ternary"
    quantiser: Literal["absmean_round", "sign_center"] = Field(
        "absmean_round",
        description="absmean_round: clip(round(w / s), -1, 1)·s with s = mean |w|; "
        "sign_center: sign(w - mean w)·s, which gives two values in practice",
    )
    granularity: Literal["tensor", "row", "group"] = Field(
        "tensor", description="what shares a scale: the whole weight, an output row, or group_size inputs of a row"
    )
    group_size: int | None = Field(
        None, gt=0, description="neighbouring inputs that share a scale, with granularity group; the last may be fewer"
    )
    layout: Literal["trits", "two_bit"] = Field(
        "trits", description="how codes lie in memory: trits: five to a byte; two_bit: four to a byte"
    )
    sites: SitePatterns = LAYERS

    @model_validator(mode="after")
    def _check(self) -> Settings:
        if (self.granularity == "group") != (self.group_size is not None):
            raise ValueError(f"granularity {self.granularity} with group_size {self.group_size}: give both or neither")
        for _, overrides in self.sites:
            if overrides:
                Settings.model_validate(merge(self.model_dump(exclude={"sites"}), overrides))
        return self

    @property
    def random_faults(self) -> bool:
        """Nothing random here."""
        return False
