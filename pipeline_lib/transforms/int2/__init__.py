"""Transform `int2`: weights of a few bits in groups along the input, each with a scale and a zero point of its own.

Inputs stay as they are. In training the weights are latent floats, rounded at each forward pass with a straight-through
gradient; `convert` packs them. Clipping ranges come from the stage `clip`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline_lib.transforms.int2.settings import Clip, Settings

if TYPE_CHECKING:
    from pipeline_lib.transforms.base import Transform

__all__ = ["Settings", "build", "calibration"]

AT_LINEAR = ("store",)
"""What it is to a linear layer; of two transforms of one kind a plan refuses the composition."""
PACKS = True
"""Checkpoints under this transform get a packed form beside the latent one."""


def build(settings: Settings) -> Transform:
    """The transform of these settings."""
    from pipeline_lib.transforms.int2.store import Int2

    return Int2(settings)


def calibration(settings: Settings) -> Clip | None:
    """What stage `clip` runs over the model for it, or None."""
    return settings.clip
