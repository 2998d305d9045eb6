"""Settings of `optical`. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pipeline_lib.config.base import Settings as Base
from pipeline_lib.transforms.calibration import Calibration
from pipeline_lib.transforms.patterns import IN_LAYERS, SitePatterns, merge

LAYERS: Any = {f"linear:{IN_LAYERS}": {}, f"product:{IN_LAYERS}": {}}
MOST_LEVELS = 2**22
"""Up to here the number of a level has a fraction in fp32 to be rounded."""

Levels = Annotated[int, Field(ge=2, le=MOST_LEVELS)]


class Observation(Calibration):
    """The text that ranges are observed on, in passes of the exact model.

    The samples, one after the other, fill the sequences; a batch is smoothed like a training step.
    """

    samples: int = Field(default=512, ge=1, description="texts at most, the first of the dataset in seeded order")
    batches: int = Field(
        default=16, ge=1, description="batches of the text that are looked at, at most; each moves the ranges once"
    )
    batch_size: int = Field(default=8, ge=1, description="sequences a batch")


class Ramp(Base):
    """A training that begins close to exact arithmetic; evaluations are always at full strength."""

    of: Literal["levels", "noise"] = Field(
        default="levels",
        description="levels: their number falls geometrically from from_levels, lut_min stays as it is; noise: what "
        "rounding, clamping and dither add to a value grows linearly from nothing",
    )
    steps: int = Field(ge=1, description="optimizer steps after which the transform has its full strength")
    from_levels: Levels = Field(default=2**16, description="levels of everything in step 0, with of: levels")


class Settings(Base):
    """Products of two quantised operands, with a quantised and dithered result."""

    type: Literal["optical"] = "optical"
    levels: Levels = Field(default=256, description="values that an operand can take within its range")
    output_levels: Levels | None = Field(
        default=None, description="values that a result can take within its range; null: as levels"
    )
    dither: bool = Field(
        default=True,
        description="whether results get noise, uniform over one step between levels and independent for each "
        "element, before they are rounded; false: they are rounded to the nearest level",
    )
    lut_min: float | None = Field(
        default=0.02004,
        ge=0,
        lt=1,
        description="of the right operand (weight, key, value): smallest magnitude other than 0 that the modulator's "
        "look-up table reaches, as a share of the range's end on that side; null: no such limit",
    )
    quantiles: tuple[float, float] | None = Field(
        default=None,
        description="shares of a sequence's (or a weight's) elements below the range's ends, for example "
        "[0.001, 0.999]; null: least and largest element",
    )
    smoothing: float = Field(
        default=0.9, ge=0, lt=1, description="share of a range that stays at each step; the rest is what was observed"
    )
    gate: bool = Field(
        default=False,
        description="whether values outside their range get no gradient; false: it passes straight through",
    )
    ramp: Ramp | None = Field(default=None, description="ease the transform in over training: {of, steps, from_levels}")
    calibration: Observation = Field(
        default_factory=Observation, description="for weights that were not trained under this transform"
    )
    sites: SitePatterns = LAYERS

    @model_validator(mode="after")
    def _check(self) -> Settings:
        if self.quantiles is not None and not 0 <= self.quantiles[0] < self.quantiles[1] <= 1:
            raise ValueError(f"quantiles {list(self.quantiles)} must be two rising shares from 0 to 1")
        ramp, most = self.ramp, max(self.levels, self.output_levels or 0)
        if ramp is not None and ramp.of == "levels" and ramp.from_levels < most:
            raise ValueError(f"ramp.from_levels {ramp.from_levels} is below the {most} levels that the ramp leads to")
        for _, overrides in self.sites:
            if overrides:
                Settings.model_validate(merge(self.model_dump(exclude={"sites"}), overrides))
        return self

    @property
    def random_faults(self) -> bool:
        """Whether an evaluation must be repeated over fault seeds."""
        return self.dither
