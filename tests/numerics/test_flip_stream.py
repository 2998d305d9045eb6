"""The stream: what a mask depends on and what not; where flips land; shapes, strides, in place."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from pipeline_lib.numerics import flip_reference
from pipeline_lib.numerics.bitflips import flip, flip_, make_plan, plan_for
from pipeline_lib.numerics.flip_plan import FlipPlan
from pipeline_lib.numerics.streams import site_key
from tests.numerics.flip_checks import mask_of
from tests.numerics.flip_definition import mask_by_definition

KEY = site_key(5, "model.layers.1.mlp.up_proj", "input")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
PLANS: dict[str, FlipPlan] = {
    "half": plan_for(torch.float32, 0.5),
    "dense and sparse": plan_for(torch.bfloat16, 0.3),
    "two groups": plan_for(torch.float16, 0.0, 0.9, 0.002),
    "sparse": plan_for(torch.float32, 1e-3, 2e-4),
    "bytes": make_plan(8, [(0xF0, 0.05), (0x0E, 0.01), (0x01, 1.0)]),
}
PLAN_NAMES = sorted(PLANS)


@pytest.mark.parametrize("name", PLAN_NAMES)
def test_masks_follow_the_definition(name: str) -> None:
    """The vectorised reference against the definition's sentences, one call at a time."""
    plan = PLANS[name]
    per_word = 32 // plan.bits
    elements = 4096 * per_word + 3
    for row in (0, 7, 2**32 - 1):
        words = mask_by_definition(plan, KEY, row, tiles=2)
        expected = words.view(np.dtype(f"u{plan.bits // 8}"))[:elements]
        drawn = mask_of(plan, KEY, 1, elements, first_row=row).numpy().view(expected.dtype)[0]
        assert (drawn == expected).all()


@pytest.mark.parametrize("name", PLAN_NAMES)
def test_the_stream_is_fixed_for_good(name: str) -> None:
    """A change of any random bit changes every published result: it must fail here first."""
    digests = {
        "half": "2c38fce65bd350e6",
        "dense and sparse": "46db88139d203c02",
        "two groups": "1674fb48ed309304",
        "sparse": "ddf47d9b4c9bcec3",
        "bytes": "31a1e4e47b1f0730",
    }
    drawn = mask_of(PLANS[name], KEY, 3, 20_001, first_row=6)
    assert hashlib.sha256(drawn.numpy().tobytes()).hexdigest()[:16] == digests[name]


@pytest.mark.parametrize("name", PLAN_NAMES)
def test_masks_depend_on_neither_batch_nor_padding_nor_pass_size(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = PLANS[name]
    whole = mask_of(plan, KEY, 8, 6_000, first_row=40)
    for first, count in ((0, 4), (4, 4), (5, 1)):
        assert torch.equal(mask_of(plan, KEY, count, 6_000, first_row=40 + first), whole[first : first + count])
    assert torch.equal(mask_of(plan, KEY, 8, 9_001, first_row=40)[:, :6_000], whole)
    monkeypatch.setattr(flip_reference, "_CALLS", 700)
    assert torch.equal(mask_of(plan, KEY, 8, 6_000, first_row=40), whole)


@pytest.mark.parametrize("name", PLAN_NAMES)
def test_decoding_draws_the_mask_of_the_full_forward(name: str) -> None:
    plan = PLANS[name]
    features, positions = 301, 60
    whole = mask_of(plan, KEY, 3, positions * features, first_row=9).view(3, positions, features)
    for position in (0, 1, 13, 27, 59):
        step = mask_of(plan, KEY, 3, features, first_row=9, first_element=position * features)
        assert torch.equal(step, whole[:, position])


def test_rows_tiles_and_keys_beyond_32_bits() -> None:
    plan = PLANS["sparse"]
    far = 4096 * (2**32 - 1) + 5
    assert torch.equal(mask_of(plan, KEY, 2, 300, 2**32 - 1)[1], mask_of(plan, KEY, 1, 300, 0)[0])
    wrapped = mask_of(plan, KEY, 1, 9_000, 1, far)[0, 4091:]
    assert torch.equal(wrapped[:4096], mask_of(plan, KEY, 1, 4096, 1)[0])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("p", [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
def test_zero_and_one_are_exact(dtype: torch.dtype, p: tuple[float, float]) -> None:
    x = torch.randn(2, 500).to(dtype)
    bits, signed = 8 * dtype.itemsize, {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    exponent = -1 << {torch.float32: 23, torch.float16: 10, torch.bfloat16: 7}[dtype]
    expected = (exponent if p[0] else 0) | (~exponent if p[1] else 0)
    assert torch.equal(flip(x, plan_for(dtype, 0, *p), torch.tensor(1)).view(signed), x.view(signed) ^ expected)
    assert bits in (16, 32)


def test_nothing_to_do_returns_the_tensor_itself() -> None:
    x = torch.randn(2, 3)
    assert flip(x, plan_for(x.dtype, 0), torch.tensor(1)) is x


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int8, torch.uint8, torch.int16, torch.int32])
def test_any_dtype_shape_and_stride(dtype: torch.dtype) -> None:
    plan = plan_for(dtype, 0.02)
    base = torch.randint(0, 100, (6, 10, 14)).to(dtype)
    key = torch.tensor(KEY)
    for x in (base, base.transpose(1, 2), base[::2, 1:, ::3], base[:, :1], base[:0], base[:, :0], base[0, 0]):
        signed = {1: torch.int8, 2: torch.int16, 4: torch.int32}[dtype.itemsize]
        y = flip(x, plan, key, 3)
        rows = max(x.shape[0], 1)
        drawn = mask_of(plan, KEY, rows, x.numel() // rows, 3).view(x.shape)
        assert y.is_contiguous()
        assert torch.equal(y.view(signed), x.contiguous().view(signed) ^ drawn)


@pytest.mark.parametrize("p", [1e-3, 0.3, 0.6])
def test_in_place_equals_out_of_place_and_undoes_itself(p: float) -> None:
    plan = plan_for(torch.bfloat16, p)
    key = torch.tensor(KEY)
    base = torch.randn(4, 30, 50).to(torch.bfloat16)
    for view in (base, base.transpose(1, 2), base[1:, ::2]):
        before = view.clone()
        version = base._version
        flip_(view, plan, key, 2, 7)
        assert base._version > version
        assert torch.equal(view.contiguous().view(torch.int16), flip(before, plan, key, 2, 7).view(torch.int16))
        assert not torch.equal(view, before)
        flip_(view, plan, key, 2, 7)
        assert torch.equal(view.contiguous().view(torch.int16), before.contiguous().view(torch.int16))


def test_wrong_arguments_are_refused() -> None:
    x, key = torch.zeros(2, 2), torch.tensor(1)
    with pytest.raises(ValueError, match="16 bits"):
        flip(x, plan_for(torch.bfloat16, 0.1), key)
    with pytest.raises(ValueError, match="0-d"):
        flip(x.sum(), plan_for(torch.float32, 0.1), key)
    with pytest.raises(ValueError, match="threshold"):
        flip(x, plan_for(torch.float32, 0.1), key, threshold=-1.0)
    with pytest.raises(ValueError, match="threshold"):
        flip(x.int(), plan_for(torch.int32, 0.1), key, threshold=1.0)
    for dtype in (torch.float64, torch.int64, torch.bool, torch.complex64):
        with pytest.raises(ValueError, match=str(dtype).removeprefix("torch.")):
            plan_for(dtype, 0.1)
