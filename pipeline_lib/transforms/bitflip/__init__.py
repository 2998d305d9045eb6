"""Transform `bitflip`: independent random bit flips of the operands in memory, and a zero-out guard behind them.

Every bit of an operand flips with a probability of its own group, anew for each step and each sequence (activations) or
virtual device (weights); then the guard sets every value that is not below a threshold to 0. Biases, outputs and
accumulators are not touched, nor are the head and the embeddings unless a pattern names them; training and evaluation
are treated alike. Stored weights stay as they are: faults are transient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline_lib.transforms.bitflip.settings import Settings

if TYPE_CHECKING:
    from pipeline_lib.transforms.base import Transform

__all__ = ["Settings", "build"]


def build(settings: Settings) -> Transform:
    """The transform of these settings."""
    from pipeline_lib.transforms.bitflip.faults import BitFlip

    return BitFlip(settings)
