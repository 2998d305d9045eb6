"""The benchmarks of optical products compare the same arithmetic, and refuse to measure what is not there."""

from __future__ import annotations

import pytest
import torch

from benchmarks import optical_gpu, optical_step
from pipeline_lib.config.errors import UserError
from pipeline_lib.transforms.optical.product import How, product


@pytest.mark.parametrize("linear", [True, False])
def test_the_rival_computes_the_same(linear: bool) -> None:
    torch.manual_seed(0)
    shapes = [(2, 6, 9), (7, 9)] if linear else [(2, 3, 6, 9), (2, 3, 9, 4)]
    left, right = ((torch.randn(shape)).requires_grad_() for shape in shapes)
    ranges, knobs = torch.tensor([[-2.0, 2.0], [-2.0, 2.0], [-5.0, 5.0]]), torch.tensor([63.0, 63.0, 0.0])
    how = How(linear, 0.02, False, None, True, False)
    found = []
    for call in (product, optical_step.plain_product):
        y, seen = call(left, right, ranges, knobs, None, how)
        found.append((y, seen, *torch.autograd.grad(y.sum(), (left, right))))
    (y, seen, *_), (theirs, theirs_seen, *_) = found
    assert (
        torch.isclose(y, theirs, atol=1e-5).double().mean() > 0.97
    )  # another order of sums crosses a tie now and then
    torch.testing.assert_close(seen, theirs_seen)
    for gradients in found:
        assert all(gradient.abs().sum() > 0 for gradient in gradients[2:])


def test_ratios_are_ours_over_theirs_within_rounds() -> None:
    times = {
        optical_step.PLAIN: [(1.0, 1.0), (2.0, 2.0), (1.0, 1.0)],
        optical_step.OURS: [(2.0, 1.0), (2.0, 3.0), (3.0, 4.0)],
        optical_step.RIVAL: [(4.0, 2.0), (8.0, 6.0), (6.0, 4.0)],
    }
    plain, ours, rival = optical_step.rows(
        times, {optical_step.PLAIN: 10, optical_step.OURS: 20, optical_step.RIVAL: 40}
    )
    assert (plain["ours / it"], ours["ours / it"], rival["ours / it"]) == (2.0, 1.0, 0.5)
    assert (plain["peak, ours / it"], rival["peak, ours / it"]) == (2.0, 0.5)
    assert rival["processor time, ours / it"] == 0.5
    milliseconds = {name: [wall for wall, _ in own] for name, own in times.items()}
    gpu = optical_gpu.rows("60m", milliseconds, dict.fromkeys(times, 10))
    assert [row["goal"] for row in gpu] == ["time 2: met", None, "time 0.5: met, memory 0.5: MISSED"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
def test_without_a_gpu_nothing_is_measured() -> None:
    with pytest.raises(UserError, match="torch sees none"):
        optical_gpu.need_a_gpu()
