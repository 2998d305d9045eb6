"""Transform `analog`: linear layers computed inside tiles of analog memory.

Each weight is the difference of two conductances of phase-change memory, which programming misses, drift lowers and
reading disturbs; inputs pass a digital-to-analog converter, sums over a tile an analog-to-digital one. Biases, norms,
attention products, the head and the embeddings are exact. Gradients are straight-through (Bengio et al., 2013, arXiv
1308.3432): those of the exact product of the inputs with the weights as they are read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline_lib.transforms.analog.settings import Settings

if TYPE_CHECKING:
    from pipeline_lib.transforms.base import Transform

__all__ = ["Settings", "build"]


AT_LINEAR = ("store", "compute")  # the product is made where the weights lie
"""What it is to a linear layer; of two transforms of one kind a plan refuses the composition."""


def build(settings: Settings) -> Transform:
    """The transform of these settings."""
    from pipeline_lib.transforms.analog.tiles import Analog

    return Analog(settings)
