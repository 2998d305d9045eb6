"""Transform `optical`: matrix products of an optical machine (Anderson et al., 2023, arXiv 2302.10360).

At linear layers and at the products of attention both operands and the result are rounded to a number of levels within
running ranges: what modulators, detectors and converters of such a machine let through. The result is dithered, an
element at a time. Gradients pass straight through.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline_lib.transforms.optical.settings import Observation, Settings

if TYPE_CHECKING:
    from pipeline_lib.transforms.base import Transform

__all__ = ["Settings", "build", "calibration"]


AT_LINEAR = ("compute",)
"""What it is to a linear layer; of two transforms of one kind a plan refuses the composition."""


def build(settings: Settings) -> Transform:
    """The transform of these settings."""
    from pipeline_lib.transforms.optical.compute import Optical

    return Optical(settings)


def calibration(settings: Settings) -> Observation:
    """How stage `clip` finds the ranges of weights that were not trained under the transform."""
    return settings.calibration
