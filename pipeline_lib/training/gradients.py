"""The gradient of a whole step: its norm over all ranks, its limit, and the end of a training that has none."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from pipeline_lib.config.errors import UserError


def gradient_norm(model: nn.Module, limit: float | None, scale: float = 1.0) -> float:
    """Global L2 norm of the gradient; gradients are scaled down to `limit` where they exceed it.

    Args:
        scale: what the loss was multiplied by; the gradients are divided by it, unless they overflowed.
    """
    at_most = math.inf if limit is None or scale != 1.0 else limit
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), at_most)
    norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    if scale == 1.0:
        return norm
    norm = norm / scale
    if math.isfinite(norm):
        factor = 1.0 if limit is None else min(1.0, limit / (norm + 1e-6))
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(factor / scale)
    return norm


def not_finite(step: int, loss: float, norm: float) -> UserError:
    """The error for a training that has gone astray; its last checkpoint is from before."""
    return UserError(
        f"training diverged: the loss or its gradient is not finite in step {step + 1}",
        value=f"loss {loss}, gradient norm {norm}",
        allowed="finite numbers",
        fix="lower lr or the transform's error rate, or set a threshold that zeroes extreme values",
    )
