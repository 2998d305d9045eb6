"""Losses per example; engines divide by the number of targets in the last line."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline_lib.data.masking import IGNORED


def cross_entropy_per_example(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Summed cross entropy of each sequence's targets, in nats, fp32.

    Args:
        logits_BTV: any float dtype; position t is scored against label t (labels are shifted already).
        labels_BT: int64, IGNORED where there is nothing to predict.

    Returns:
        loss_B: fp32; 0 for a sequence without targets.
    """
    loss_N = F.cross_entropy(
        logits_BTV.float().flatten(0, 1), labels_BT.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return loss_N.view_as(labels_BT).sum(dim=1)


def count_targets(labels_BT: Tensor) -> int:
    """Number of positions with something to predict."""
    return int(torch.count_nonzero(labels_BT != IGNORED))
