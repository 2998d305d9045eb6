"""The sliced cross entropy against torch's."""

from __future__ import annotations

import pytest
import torch

from pipeline_lib.training.titan import loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("limit", [1, 100, 10**6])
def test_value_and_gradient(dtype: torch.dtype, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices of one row, of three rows with a shorter last one, and all at once."""
    monkeypatch.setitem(loss.SLICE, "cpu", limit)
    generator = torch.Generator().manual_seed(0)
    logits_BTV = (30 * torch.randn(2, 5, 33, generator=generator)).to(dtype).requires_grad_()
    labels_BT = torch.randint(33, (2, 5), generator=generator)
    found = loss.cross_entropy_sum(logits_BTV, labels_BT) / 7
    (gradient,) = torch.autograd.grad(found, logits_BTV)
    exact = logits_BTV.detach().double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(exact.flatten(0, 1), labels_BT.flatten(), reduction="sum") / 7
    (expected_gradient,) = torch.autograd.grad(expected, exact)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    assert gradient.dtype == dtype
    tolerance = 1e-6 if dtype == torch.float32 else 2**-9
    assert torch.allclose(gradient.double(), expected_gradient, rtol=tolerance * 2, atol=1e-7)


def test_large_logits_do_not_overflow() -> None:
    logits_BTV = torch.tensor([[[1e5, -1e5, 0.0]]], requires_grad=True)
    found = loss.cross_entropy_sum(logits_BTV, torch.tensor([[1]]))
    found.backward()
    assert found.item() == 2e5
    assert logits_BTV.grad is not None
    assert torch.equal(logits_BTV.grad, torch.tensor([[[1.0, -1.0, 0.0]]]))
