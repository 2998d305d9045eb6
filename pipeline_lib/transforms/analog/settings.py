"""Settings of `analog`. Imports no torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from pipeline_lib.config.base import Settings as Base
from pipeline_lib.transforms.patterns import IN_LAYERS, SitePatterns, merge

LAYERS: Any = {IN_LAYERS: {}}


class Settings(Base):
    """Linear layers in tiles of phase-change memory; `sites` says where, and may change the tiles by layer."""

    type: Literal["analog"] = "analog"
    tile_size: int = Field(
        512, gt=0, description="inputs and outputs of a tile; sums of tiles beside each other are digital and exact"
    )
    dac_bits: int | None = Field(
        8, ge=2, le=16, description="of the converter of a tile's inputs, per token scaled to its range; null: exact"
    )
    adc_bits: int | None = Field(
        8, ge=2, le=16, description="of the converter of a tile's sums, of range adc_range; null: exact, no range"
    )
    adc_range: float = Field(
        12.0,
        gt=0,
        description="largest sum the output converter tells, in sums of one device of the largest conductance at the "
        "largest input; larger ones saturate",
    )
    programming_noise: float = Field(
        1.0, ge=0, description="factor on the published standard deviation of what programming misses; 0: none"
    )
    read_noise: float = Field(
        1.0, ge=0, description="factor on the published standard deviation of a reading, drawn each step; 0: none"
    )
    drift: float = Field(1.0, ge=0, description="factor on the published drift exponents; 0: none")
    time: float = Field(
        0.0, ge=0, description="seconds between programming (20 s after the last pulse) and reading: drift, read noise"
    )
    drift_compensation: bool = Field(
        True, description="whether each layer's outputs are scaled up by what its conductances are expected to drift"
    )
    chip_seed: int = Field(
        0, ge=0, description="seed of programming noise and drift exponents: the chip; seed and step change neither"
    )
    sites: SitePatterns = LAYERS

    @model_validator(mode="after")
    def _check_overrides(self) -> Settings:
        for _, overrides in self.sites:
            if overrides:
                self.at(overrides)
        return self

    def at(self, overrides: dict[str, Any]) -> Settings:
        """These settings with a pattern's overrides laid over them."""
        return Settings.model_validate(merge(self.model_dump(exclude={"sites"}), overrides))

    @property
    def random_faults(self) -> bool:
        """Whether an evaluation must be repeated over fault seeds: only if reading is noisy somewhere."""
        return any(s.read_noise > 0 for s in (self, *(self.at(over) for _, over in self.sites if over)))
