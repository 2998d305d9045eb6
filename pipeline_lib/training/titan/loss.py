"""Cross entropy in slices of rows: torch's sums, in cache on a CPU and without fp32 copies of all logits."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

SLICE = {"cpu": 2**17, "cuda": 2**27}
"""Logits a slice: as many as a core's cache holds, and on a GPU enough to fill it (0.5 GB in fp32)."""


def build_loss(job_config: Any, **parts: Any) -> Any:
    """torchtitan's hook for a loss: (logits [B, T, V], labels [B, T] int64) → sum over tokens, fp32."""
    del job_config, parts
    return cross_entropy_sum


def cross_entropy_sum(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """−Σ log softmax(logits)[label], computed in fp32; 0-d. Every label counts."""
    return _CrossEntropy.apply(logits_BTV.flatten(0, 1), labels_BT.flatten())  # type: ignore[return-value]


class _CrossEntropy(torch.autograd.Function):
    """Keeps the logits and two numbers a row, from which the backward pass finds the softmax again.

    These are the largest logit m and s = Σ exp(logit − m): their sum m + log s alone would be rounded to the
    precision of the logits' common offset.
    """

    @staticmethod
    def forward(ctx: Any, logits_NV: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
        rows = max(SLICE.get(logits_NV.device.type, 2**20) // logits_NV.shape[1], 1)
        peak_N = torch.empty(len(labels_N), dtype=torch.float32, device=logits_NV.device)
        sum_N = torch.empty_like(peak_N)
        for logits_RV, peak_R, sum_R in zip(*(x.split(rows) for x in (logits_NV, peak_N, sum_N)), strict=True):
            peak_R.copy_(logits_RV.amax(-1))
            torch.sum((logits_RV.float() - peak_R[:, None]).exp_(), -1, out=sum_R)
        ctx.save_for_backward(logits_NV, labels_N, peak_N, sum_N)
        ctx.rows = rows
        label_N = logits_NV.gather(1, labels_N[:, None]).squeeze(1).float()
        return (sum_N.log() - (label_N - peak_N)).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sum: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits_NV, labels_N, peak_N, sum_N = ctx.saved_tensors
        grad_NV, scale_N = torch.empty_like(logits_NV), grad_sum / sum_N
        slices = (x.split(ctx.rows) for x in (logits_NV, labels_N, peak_N, scale_N, grad_NV))
        for logits_RV, labels_R, peak_R, scale_R, grad_RV in zip(*slices, strict=True):
            p_RV = (logits_RV.float() - peak_R[:, None]).exp_().mul_(scale_R[:, None])
            p_RV.scatter_add_(1, labels_R[:, None], (-grad_sum).expand(len(labels_R), 1))
            grad_RV.copy_(p_RV)
        return grad_NV, None
