"""Transform `ternary`: linear weights of three values, -s, 0 and s, held as packed codes and scales.

Trained weights stay fp32 (latent) and pass their gradient straight through the quantiser (Bengio et al., 2013, arXiv
1308.3432); frozen ones can be held as the packed codes alone, and then no product unpacks a whole matrix.
Activations, biases, norms, the head and the embeddings are not touched unless a pattern names them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline_lib.transforms.ternary.settings import Settings

if TYPE_CHECKING:
    from pipeline_lib.transforms.base import Transform

__all__ = ["Settings", "build"]

AT_LINEAR = ("store",)
"""What it is to a linear layer; of two transforms of one kind a plan refuses the composition."""
PACKS = True
"""Checkpoints under this transform get a packed form beside the latent one."""


def build(settings: Settings) -> Transform:
    """The transform of these settings."""
    from pipeline_lib.transforms.ternary.store import Ternary

    return Ternary(settings)
