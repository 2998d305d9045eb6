"""Ternary codes and grids against the check vectors of the definition, and the packed product against the plain one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pipeline_lib.numerics import look_up
from pipeline_lib.numerics.ternary_linear import TILE, dequantise, ternary_linear
from pipeline_lib.numerics.trits import Layout, code_table, pack_codes, packed_width, quantise, unpack_codes

LAYOUTS: tuple[Layout, ...] = ("trits", "two_bit")


def test_check_vectors_of_the_layout() -> None:
    """Ten codes in two bytes, the first of five neighbours in the most significant digit; what every byte means."""
    codes = torch.tensor([1, -1, 0, 1, 0, 0, 0, 0, 0, 1])
    assert pack_codes(codes).tolist() == [178, 122]
    table = code_table("trits", torch.int8, torch.device("cpu"))
    assert table.shape == (256, 5)
    assert table[[0, 121, 242]].tolist() == [[-1] * 5, [0] * 5, [1] * 5]
    assert (table[243:] == 1).all()
    assert len({tuple(row) for row in table[:243].tolist()}) == 243, "every byte of use means something else"


def test_two_bits_a_code() -> None:
    assert pack_codes(torch.tensor([1, -1, 0, 1, 0]), "two_bit").tolist() == [0b10_01_00_10, 0b01_01_01_01]
    assert code_table("two_bit", torch.int8, torch.device("cpu"))[255].tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 4), (7, 5), (100, 23), (2, 3, 41), (5, 4160 % 97)])
def test_codes_come_back_whatever_the_shape(layout: Layout, shape: tuple[int, ...]) -> None:
    codes = torch.randint(-1, 2, shape, dtype=torch.int8)
    packed = pack_codes(codes, layout)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*shape[:-1], packed_width(shape[-1], layout))
    assert torch.equal(unpack_codes(packed, shape[-1], layout), codes)


@pytest.mark.parametrize("entry", [1, 4, 5])
@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("features", [1, 13, 20])
def test_the_compiled_look_up_is_that_of_torch(
    entry: int, dtype: torch.dtype, features: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = torch.randint(-99, 99, (256, entry)).to(dtype)
    packed = torch.randint(0, 256, (7, -(-features // entry)), dtype=torch.uint8)
    assert look_up._library() is not None, "this machine has a C compiler"
    fast = look_up.look_up(table, packed.t().contiguous().t(), features)
    monkeypatch.setattr(look_up, "_library", lambda: None)
    assert torch.equal(fast, look_up.look_up(table, packed, features))


def test_five_trits_a_byte_are_a_tenth_of_half_precision() -> None:
    assert packed_width(4160) * 10 == 4160 * 2
    assert packed_width(4160, "two_bit") * 8 == 4160 * 2


# -- the grid ----------------------------------------------------------------------------------------------------------


def error(value: Tensor, codes: Tensor, scale: Tensor) -> float:
    return float((value - codes * scale).norm() / value.norm())


def test_the_default_is_ternary_and_the_named_setting_binary() -> None:
    """The error of a Gaussian weight: 0.513 for three values, 0.603 for the two that sign(w - mean) gives."""
    value = torch.randn(1000, 1000, generator=torch.Generator().manual_seed(0)) * 0.02
    three, scale = quantise(value)
    two, same = quantise(value, "sign_center")
    assert torch.equal(scale, same)
    assert scale.item() == pytest.approx(value.abs().mean().item(), rel=1e-6)
    assert error(value, three, scale) == pytest.approx(0.513, abs=2e-3)
    assert error(value, two, scale) == pytest.approx(0.603, abs=2e-3)
    assert 0.25 < float((three == 0).float().mean()) < 0.4
    assert float((two == 0).float().mean()) < 1e-5


def test_round_and_clip_by_hand() -> None:
    value = torch.tensor([[0.1, -0.6, 2.0, 0.3], [-0.1, 0.5, -1.9, 0.5]])  # mean magnitude 0.75
    codes, scale = quantise(value)
    assert scale.item() == pytest.approx(0.75)
    assert codes.tolist() == [[0, -1, 1, 0], [0, 1, -1, 1]]
    centred, _ = quantise(value, "sign_center")  # mean 0.1
    assert centred.tolist() == [[0, -1, 1, 1], [-1, 1, -1, 1]]


@pytest.mark.parametrize("group", [None, 4, 10, 100])
def test_rows_and_groups_have_scales_of_their_own(group: int | None) -> None:
    value = torch.randn(3, 23)
    codes, scale = quantise(value, per_tensor=False, group_size=group)
    width = min(group or 23, 23)
    assert scale.shape == (3, math.ceil(23 / width))
    for index in range(scale.shape[1]):
        part = value[:, index * width : (index + 1) * width]
        own, one = quantise(part, per_tensor=False)
        torch.testing.assert_close(scale[:, index], one[:, 0])
        assert torch.equal(codes[:, index * width : (index + 1) * width], own)


def test_a_process_may_have_no_rows() -> None:
    """More ranks than rows: the last ones hold nothing."""
    for settings in ({"per_tensor": False}, {"per_tensor": False, "group_size": 4}, {"reduce": lambda _: [6.0, 12.0]}):
        codes, scale = quantise(torch.empty(0, 10), **settings)  # type: ignore[arg-type]
        assert codes.shape == (0, 10)
        assert pack_codes(codes).shape == (0, 2)
        assert scale.shape[0] == (1 if "reduce" in settings else 0)


def test_zeros_stay_zeros() -> None:
    for quantiser in ("absmean_round", "sign_center"):
        codes, scale = quantise(torch.zeros(4, 7), quantiser, per_tensor=False, group_size=3)
        assert not codes.any()
        assert not scale.any()
        assert not torch.isnan(scale).any()


def test_no_column_is_padded_before_the_mean() -> None:
    """The source padded the weight itself with random columns, which moved mean and scale."""
    value = torch.randn(8, 23)
    codes, scale = quantise(value)
    assert codes.shape == (8, 23)
    assert scale.item() == pytest.approx(value.abs().mean().item(), rel=1e-6)


def test_shares_of_rows_give_the_scale_of_the_whole() -> None:
    value = torch.randn(10, 23)
    parts = [value[:6], value[6:]]
    whole_codes, whole_scale = quantise(value)

    def add(kind: int) -> list[float]:
        values = [part.abs() if kind == 0 else part for part in parts]
        return [float(sum(v.sum(dtype=torch.float64) for v in values)), float(value.numel())]

    for part, rows in zip(parts, (slice(0, 6), slice(6, 10)), strict=True):
        codes, scale = quantise(part, reduce=lambda _: add(0))
        torch.testing.assert_close(scale, whole_scale)
        assert torch.equal(codes, whole_codes[rows])


# -- the product -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("per_tensor", "group"), [(True, None), (False, None), (False, 7)])
@pytest.mark.parametrize("shape", [(5, 23), (300, 4099)])  # one tile, and several
def test_product_and_gradient_are_those_of_the_dequantised_weight(
    layout: Layout, per_tensor: bool, group: int | None, shape: tuple[int, int]
) -> None:
    value = torch.randn(shape)
    codes, scale = quantise(value, per_tensor=per_tensor, group_size=group)
    packed = pack_codes(codes, layout)
    weight = dequantise(packed, scale, shape[1], layout, group)
    expected = codes * (scale if scale.shape[1] == 1 else scale.repeat_interleave(7, 1)[:, : shape[1]])
    assert torch.equal(weight, expected)
    x = torch.randn(2, 3, shape[1], requires_grad=True)
    y = ternary_linear(x, packed, scale, shape[1], layout, group)
    torch.testing.assert_close(y, x @ weight.t(), rtol=1e-4, atol=1e-3)
    (y * torch.arange(shape[0])).sum().backward()
    got, x.grad = x.grad, None
    (x @ weight.t() * torch.arange(shape[0])).sum().backward()
    torch.testing.assert_close(got, x.grad, rtol=1e-4, atol=1e-1)
    assert (shape[0] * shape[1] > TILE) == (shape == (300, 4099))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_out_as_it_went_in(dtype: torch.dtype) -> None:
    codes, scale = quantise(torch.randn(9, 40))
    x = torch.randn(4, 40, dtype=dtype, requires_grad=True)
    y = ternary_linear(x, pack_codes(codes), scale, 40)
    y.sum().backward()
    assert y.dtype == dtype
    assert x.grad is not None
    assert x.grad.dtype == dtype


@pytest.mark.parametrize("rows", [1, 1024])
def test_no_whole_matrix_is_ever_there(rows: int) -> None:
    """Beside x, y and their gradients a forward and a backward pass allocate a part of the weight, never all of it."""
    out, features = 2048, 2048
    codes, scale = quantise(torch.randn(out, features))
    packed = pack_codes(codes)
    x = torch.randn(rows, features, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        y = ternary_linear(x, packed, scale, features)
        y.backward(torch.ones_like(y))
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()  # type: ignore[attr-defined]
        peak = max(peak, now)
    assert 0 < peak - 4 * rows * (2 * out + features) < 0.5 * out * features * 4


def test_gradients_need_not_be_contiguous() -> None:
    """The source's backward pass viewed the gradient, which fails on a transposed one."""
    codes, scale = quantise(torch.randn(6, 10))
    x = torch.randn(4, 3, 10, requires_grad=True)
    y = ternary_linear(x, pack_codes(codes), scale, 10).transpose(0, 1)
    (y * torch.randn(3, 4, 6)).sum().backward()
    assert x.grad is not None


def test_the_product_keeps_no_activations() -> None:
    """There is no gradient to a packed weight, so x is not needed; the source kept it."""
    codes, scale = quantise(torch.randn(6, 10))
    packed, kept = pack_codes(codes), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        ternary_linear(torch.randn(4, 10, requires_grad=True), packed, scale, 10)
    assert set(kept) == {packed.data_ptr(), scale.data_ptr()}
