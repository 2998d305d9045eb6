"""The operation under autograd, checkpointing and torch.compile; the zero-out gate."""

from __future__ import annotations

import math

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pipeline_lib.numerics import bitflips, flip_native
from pipeline_lib.numerics.bitflips import flip, plan_for
from pipeline_lib.numerics.flip_cpu import threshold_bits
from pipeline_lib.numerics.streams import site_key, step_key

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
SITES = [site_key(2, f"layers.{i}", "input") for i in range(2)]
KEY = torch.tensor(SITES[0])


def gate(flipped: Tensor, threshold: float) -> Tensor:
    """[|x'| < t] in double precision, which holds every value and threshold exactly; NaN compares false."""
    return flipped.double().abs() < threshold


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("p", [1e-3, 0.03, 0.3, 0.7])
@pytest.mark.parametrize("threshold", [0.0, 0.7, 1.0, 3.0, 1e9])
def test_the_gate_keeps_what_is_strictly_below(dtype: torch.dtype, p: float, threshold: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 33, 50).to(dtype)
    x[0, 0, :6] = torch.tensor([1.0, -1.0, math.inf, -math.inf, math.nan, 0.0])
    x.requires_grad_()
    plan = plan_for(dtype, p)
    flipped = flip(x.detach(), plan, KEY, 3)
    keep = gate(flipped, threshold)
    y = flip(x, plan, KEY, 3, threshold=threshold)
    assert torch.equal(y, torch.where(keep, flipped, 0.0))
    upstream = torch.randn(4, 33, 50).to(dtype)
    (grad,) = torch.autograd.grad(y, x, upstream)
    assert torch.equal(grad, torch.where(keep, upstream, 0.0))
    assert bool(keep.any()) == (threshold > 0)


@pytest.mark.parametrize("large", [False, True])
def test_the_gate_acts_on_elements_that_were_not_flipped(large: bool) -> None:
    x = torch.full((1, 100), 2.0, requires_grad=True)
    y = flip(x, plan_for(torch.float32, 2**-40), KEY, threshold=2.0 if large else 2.0000002)
    (grad,) = torch.autograd.grad(y.sum(), x)
    expected = torch.full((1, 100), 0.0 if large else 1.0)
    assert torch.equal(grad, expected)
    assert torch.equal(y.detach(), 2 * expected)


def test_a_gate_without_flips() -> None:
    x = torch.tensor([[0.5, -0.5, 1.0, math.nan, -math.inf]], requires_grad=True)
    y = flip(x, plan_for(torch.float32, 0), KEY, threshold=1.0)
    assert y.tolist() == [[0.5, -0.5, 0.0, 0.0, 0.0]]
    assert torch.autograd.grad(y.sum(), x)[0].tolist() == [[1.0, 1.0, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.3, 0.7, 1.25, 30.0, 1e-30, 65504.5, 1e6, 3.5e38, 1e300])
def test_thresholds_are_rounded_up_to_the_dtype(dtype: torch.dtype, threshold: float) -> None:
    bits = threshold_bits(threshold, dtype)
    signed = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    at, below = torch.tensor([bits, max(bits - 1, 0)], dtype=signed).view(dtype).double().tolist()
    assert at >= threshold
    assert below < threshold or bits == 0


def test_without_a_gate_the_gradient_passes_and_nothing_is_saved() -> None:
    saved: list[Tensor] = []
    x = torch.randn(3, 40, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = flip(x, plan_for(torch.float32, 0.1), KEY)
    upstream = torch.randn(3, 40)
    assert torch.equal(torch.autograd.grad(y, x, upstream)[0], upstream)
    assert saved == []


@pytest.mark.parametrize("p", [1e-4, 0.2])
def test_no_mask_is_saved_with_a_gate(p: float) -> None:
    """Only the input and where it lies in the stream."""
    saved: list[Tensor] = []
    x = torch.randn(3, 4000, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        flip(x, plan_for(torch.float32, p), KEY, threshold=5.0)
    assert len(saved) == 4
    assert all(t.data_ptr() == x.data_ptr() or t.dim() == 0 for t in saved)


@pytest.mark.parametrize(("threshold", "launches"), [(1e9, 1), (2.0, 2)])
def test_backward_draws_again_only_if_something_was_zeroed(
    threshold: float, launches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    original = flip_native.flip_memory
    monkeypatch.setattr(flip_native, "flip_memory", lambda *args: drawn.append(1) or original(*args))
    x = torch.randn(3, 4000, requires_grad=True)
    y = flip(x, plan_for(torch.float32, 0.0, 0.0, 1e-2), KEY, threshold=threshold)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad, gate(flip(x.detach(), plan_for(torch.float32, 0.0, 0.0, 1e-2), KEY), threshold).float())
    assert len(drawn) == launches + 1


PLANS = (plan_for(torch.float32, 0.002), plan_for(torch.float32, 0.05, 0.01))
FRACTION_ONLY = (plan_for(torch.float32, 0.0, 0.0, 0.05), plan_for(torch.float32, 0.0, 0.0, 0.3))


def layer(x: Tensor, weight: Tensor, step: Tensor, first: Tensor, threshold: float | None) -> Tensor:
    """Two faulty linear layers; without a gate only fraction bits flip, so that no NaN hides a difference."""
    plans = FRACTION_ONLY if threshold is None else PLANS
    for site in SITES:
        key = step_key(site, step)
        faulty = flip(weight.unsqueeze(0), plans[0], key, 0, threshold=threshold).squeeze(0)
        x = F.linear(flip(x, plans[1], key + 1, first, threshold=threshold), faulty).tanh()
    return x


def run(function: object, step: int, threshold: float | None) -> tuple[Tensor, ...]:
    """Output and gradients of a call at one step."""
    torch.manual_seed(1)
    x, weight = torch.randn(4, 6, 32, requires_grad=True), torch.randn(32, 32, requires_grad=True)
    y = function(x, weight, torch.tensor(step), torch.tensor(step * 4), threshold)  # type: ignore[operator]
    y.pow(2).sum().backward()
    assert x.grad is not None
    assert weight.grad is not None
    return y.detach(), x.grad, weight.grad


def same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("threshold", [None, 4.0])
def test_compiled_steps_share_one_graph_and_equal_eager_ones(threshold: float | None) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    results = [run(compiled, step, threshold) for step in range(4)]
    assert counter.frame_count == 1
    for step, result in enumerate(results):
        assert same(result, run(layer, step, threshold))
    assert not torch.equal(results[0][0], results[1][0])


@pytest.mark.parametrize("threshold", [None, 4.0])
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_draws_the_same_flips(threshold: float | None, reentrant: bool) -> None:
    def recomputed(*args: object) -> Tensor:
        return checkpoint(layer, *args, use_reentrant=reentrant)  # type: ignore[return-value]

    for step in range(2):
        assert same(run(recomputed, step, threshold), run(layer, step, threshold))


def test_a_mutant_that_draws_anew_in_recomputation_is_noticed() -> None:
    calls = iter(range(100))

    def stateful(x: Tensor, weight: Tensor, step: Tensor, first: Tensor, threshold: float | None) -> Tensor:
        return layer(x, weight, step + next(calls), first, threshold)

    def recomputed(*args: object) -> Tensor:
        return checkpoint(stateful, *args, use_reentrant=False)  # type: ignore[return-value]

    assert not same(run(recomputed, 0, 4.0), run(layer, 0, 4.0))


@pytest.mark.parametrize("threshold", [None, 1.0])
def test_the_operator_is_registered_soundly(threshold: float | None) -> None:
    x = torch.randn(2, 30, 4, requires_grad=True).transpose(1, 2)
    zero = torch.tensor(0)
    args = (x, KEY, zero, zero, 32, list(PLANS[1].masks), list(PLANS[1].probabilities), threshold)
    torch.library.opcheck(bitflips._flip_op, args)


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_gradient_operator_is_registered_soundly(dtype: torch.dtype) -> None:
    x, grad = (torch.randn(2, 30, 4).to(dtype).transpose(1, 2) for _ in range(2))
    plan = plan_for(dtype, 0.05, 0.01)
    zero = torch.tensor(0)
    args = (grad.requires_grad_(), x, KEY, zero, zero, plan.bits, list(plan.masks), list(plan.probabilities), 1.0)
    torch.library.opcheck(bitflips._flip_gradient_op, args)


@pytest.mark.parametrize("threshold", [None, 1.0])
def test_backward_without_any_flip(threshold: float | None) -> None:
    x = torch.tensor([[0.5, -2.0]], requires_grad=True)
    flip(x, plan_for(torch.float32, 0), KEY, threshold=threshold).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[1.0, 1.0 if threshold is None else 0.0]]


def test_fake_and_meta_tensors() -> None:
    meta = torch.randn(2, 3, 4, device="meta").transpose(1, 2)
    y = flip(meta, PLANS[0], torch.tensor(1, device="meta"))
    assert (y.shape, y.dtype, y.is_contiguous()) == (meta.shape, meta.dtype, True)
    with torch._subclasses.FakeTensorMode():
        assert flip(torch.randn(2, 3), PLANS[0], torch.tensor(1), threshold=1.0).shape == (2, 3)


def test_second_derivatives_pass_the_gate() -> None:
    x = torch.randn(2, 50, requires_grad=True)
    y = flip(x, PLANS[0], KEY, threshold=1.5)
    (grad,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x)
    kept = gate(flip(x.detach(), PLANS[0], KEY), 1.5)
    assert torch.allclose(second, torch.where(kept, 6 * y, 0.0))
