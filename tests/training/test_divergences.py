"""Divergences against their definitions, in double precision and by hand."""

from __future__ import annotations

import math

import pytest
import torch

from pipeline_lib.training.divergences import (
    cakld,
    cross_entropy,
    forward_kl,
    jsd,
    reverse_kl,
    soft_cross_entropy,
    token_scale,
)


def probabilities(*p: float) -> torch.Tensor:
    return torch.tensor(p).log()


S, T = probabilities(0.5, 0.25, 0.25), probabilities(0.8, 0.1, 0.1)


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a)


def test_definitions() -> None:
    s, t = [0.5, 0.25, 0.25], [0.8, 0.1, 0.1]
    forward, reverse = kl(t, s), kl(s, t)
    assert float(forward_kl(S, T)) == pytest.approx(forward, rel=1e-5)
    assert float(reverse_kl(S, T)) == pytest.approx(reverse, rel=1e-5)
    assert float(cakld(S, T, 0.3)) == pytest.approx(0.3 * reverse + 0.7 * forward, rel=1e-5)
    mixture = [0.9 * b + 0.1 * a for a, b in zip(s, t, strict=True)]
    assert float(jsd(S, T, 0.9)) == pytest.approx(0.9 * kl(t, mixture) + 0.1 * kl(s, mixture), rel=1e-5)
    assert float(soft_cross_entropy(S, T)) == pytest.approx(forward - sum(p * math.log(p) for p in t), rel=1e-5)
    logits = torch.randn(2, 3, 7)
    labels = torch.tensor([[1, -100, 3], [0, 6, -100]])
    expected = -torch.log_softmax(logits, -1)
    found = cross_entropy(logits, labels)
    assert float(found[0, 2]) == pytest.approx(float(expected[0, 2, 3]))
    assert found[0, 1] == found[1, 2] == 0


@pytest.mark.parametrize("loss", [forward_kl, reverse_kl, lambda s, t: jsd(s, t, 0.5), lambda s, t: cakld(s, t, 0.5)])
def test_zero_for_equals_and_positive_else(loss: object) -> None:
    logits = torch.randn(4, 50) * 5
    assert torch.allclose(loss(logits, logits), torch.zeros(4), atol=1e-6)  # type: ignore[operator]
    assert (loss(logits, torch.randn(4, 50)) > 0).all()  # type: ignore[operator]


def test_underflow_is_no_nan() -> None:
    """The published code takes the logarithm of a mixture that can be 0."""
    far = torch.tensor([[200.0, -200.0, 0.0]], requires_grad=True)
    for loss in (jsd(far, -far.detach(), 0.5), cakld(far, -far.detach(), 0.5), soft_cross_entropy(far, -far.detach())):
        assert torch.isfinite(loss).all()
        (grad,) = torch.autograd.grad(loss.sum(), far)
        assert torch.isfinite(grad).all()


def test_token_scale_leaves_padding_out() -> None:
    """Weights add up to the number of targets; what is no target has none, and changes none."""
    surprise = torch.tensor([[1.0, 12.0, 3.0, 0.0, 0.0], [2.0, 2.0, 0.0, 0.0, 0.0], [0.0] * 5])
    mask = torch.tensor([[True, True, True, False, False], [True, True, False, False, False], [False] * 5])
    weight = token_scale(surprise, mask)
    expected = torch.softmax(torch.tensor([0.1, 1.2, 0.3]), 0) * 3
    assert torch.allclose(weight[0, :3], expected)
    assert weight[1].tolist() == [1, 1, 0, 0, 0]
    assert weight[2].tolist() == [0] * 5
    assert torch.equal(token_scale(surprise[:, :3], mask[:, :3]), weight[:, :3])
