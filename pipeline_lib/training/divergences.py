"""Losses between a student's and a teacher's next-token distributions, per position.

T and S are the teacher's and the student's probabilities, both at the same temperature. All sums are fp32 and in
log space, so that a probability that underflows to 0 gives no NaN.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline_lib.training.losses import IGNORED

TLSD_TEMPERATURE = 10.0


def forward_kl(student_BTV: Tensor, teacher_BTV: Tensor) -> Tensor:
    """KL(T‖S) of logits [..., V] → [...], nats; mass-covering (Hinton et al., 2015)."""
    student, teacher = torch.log_softmax(student_BTV, -1), torch.log_softmax(teacher_BTV, -1)
    return (teacher.exp() * (teacher - student)).sum(-1)


def reverse_kl(student_BTV: Tensor, teacher_BTV: Tensor) -> Tensor:
    """KL(S‖T) of logits [..., V] → [...], nats; mode-seeking (Gu et al., 2024)."""
    return forward_kl(teacher_BTV, student_BTV)


def jsd(student_BTV: Tensor, teacher_BTV: Tensor, beta: float) -> Tensor:
    """β·KL(T‖M) + (1−β)·KL(S‖M), M = β·T + (1−β)·S (Agarwal et al., 2024, eq. 1 of GKD) → [...], nats."""
    student, teacher = torch.log_softmax(student_BTV, -1), torch.log_softmax(teacher_BTV, -1)
    log_beta = student.new_tensor([beta, 1 - beta]).log()
    mixture = torch.logaddexp(teacher + log_beta[0], student + log_beta[1])
    to_teacher = (teacher.exp() * (teacher - mixture)).sum(-1)
    return beta * to_teacher + (1 - beta) * (student.exp() * (student - mixture)).sum(-1)


def cakld(student_BTV: Tensor, teacher_BTV: Tensor, gamma: float) -> Tensor:
    """γ·KL(S‖T) + (1−γ)·KL(T‖S), γ the teacher's confidence (Du et al., 2024, BitDistiller, eq. 6) → [...], nats."""
    return gamma * reverse_kl(student_BTV, teacher_BTV) + (1 - gamma) * forward_kl(student_BTV, teacher_BTV)


def soft_cross_entropy(student_BTV: Tensor, teacher_BTV: Tensor) -> Tensor:
    """−Σ T·log S of logits [..., V] → [...], nats."""
    return -(torch.softmax(teacher_BTV, -1) * torch.log_softmax(student_BTV, -1)).sum(-1)


def cross_entropy(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """−log S(label) → [B, T], nats; 0 where the label is IGNORED."""
    loss_N = F.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten(), ignore_index=IGNORED, reduction="none")
    return loss_N.view_as(labels_BT)


def token_scale(surprise_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """How much each position of a sequence counts under token-scaled logit distillation (Kim et al., 2023).

    The softmax over a sequence's positions of the teacher's cross entropy of the label, over 10: what the teacher finds
    hard counts more. Times the number of positions, so that the mean weight is 1 and losses stay per token.

    Args:
        surprise_BT: the teacher's cross entropy of each label, nats.
        mask_BT: positions that count; the others get 0.

    Returns:
        weight_BT: fp32.
    """
    score_BT = (surprise_BT / TLSD_TEMPERATURE).masked_fill(~mask_BT, -torch.inf)
    score_BT = torch.where(mask_BT.any(1, keepdim=True), score_BT, torch.zeros_like(score_BT))
    weight_BT = torch.softmax(score_BT.float(), dim=1) * mask_BT.sum(1, keepdim=True)
    return torch.where(mask_BT, weight_BT, torch.zeros_like(weight_BT))


DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "forward": forward_kl,
    "reverse": reverse_kl,
    "jsd": jsd,
    "cakld": cakld,
    "tlsd": soft_cross_entropy,
}
"""By the name of the recipe's `loss`; `ce` needs no teacher."""
