"""Transform `ternary`: latent and packed weights compute the same; gradients go straight through; codes can be faulty."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipeline_lib.config.errors import UserError
from pipeline_lib.models import llama
from pipeline_lib.numerics.trits import quantise
from pipeline_lib.transforms.apply import Applied, apply
from pipeline_lib.transforms.low_rank import freeze
from pipeline_lib.transforms.packed import load_packed, pack, pack_for, packed_sites, save_packed

EVERYWHERE = {"sites": {"*": {}}}
GRIDS: list[dict[str, Any]] = [
    {},
    {"granularity": "row"},
    {"granularity": "group", "group_size": 8},
    {"quantiser": "sign_center", "layout": "two_bit"},
]


def ternary(model: nn.Module, *others: dict[str, Any], **settings: Any) -> Applied:
    applied = apply(model, [{"type": "ternary", **EVERYWHERE, **settings}, *others], seed=0)
    applied.context.begin(0, 0)
    return applied


def linear(bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(23, 17, bias=bias)


def test_a_layer_multiplies_by_codes_times_scale() -> None:
    model = nn.Sequential(linear())
    weight, x = model[0].weight.detach().clone(), torch.randn(4, 3, 23)
    ternary(model)
    codes, scale = quantise(weight)
    torch.testing.assert_close(model(x), nn.functional.linear(x, codes * scale, model[0].bias))
    assert len(torch.unique((codes * scale).abs())) == 2, "0 and s"
    assert torch.equal(model[0].weight, weight), "the latent weight stays"


def test_the_gradient_goes_straight_through() -> None:
    """To the latent weight as if it had been multiplied itself; the source gave it none at all."""
    model = nn.Sequential(linear())
    x = torch.randn(4, 3, 23)
    ternary(model)
    model(x).square().sum().backward()
    codes, scale = quantise(model[0].weight)
    loaded = (codes * scale).requires_grad_()
    nn.functional.linear(x, loaded, model[0].bias).square().sum().backward()
    torch.testing.assert_close(model[0].weight.grad, loaded.grad)


@pytest.mark.parametrize("settings", GRIDS, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_packed_computes_what_latent_does(settings: dict[str, Any], bias: bool) -> None:
    model = nn.Sequential(linear(bias))
    ternary(model, **settings)
    x = torch.randn(4, 3, 23, requires_grad=True)
    latent = model(x)
    latent.sum().backward()
    gradient, x.grad = x.grad, None
    freeze(model[0], torch.float32)
    packed = model(x)
    packed.sum().backward()
    torch.testing.assert_close(packed, latent)
    torch.testing.assert_close(x.grad, gradient)


def test_packed_weights_are_buffers_that_no_checkpoint_holds() -> None:
    """The source's were parameters: optimizers saw them, and `.half()` cast its decode table."""
    model = nn.Sequential(linear())
    ternary(model)
    freeze(model[0], torch.float32)
    assert model[0].weight is None
    assert dict(model.named_parameters()).keys() == {"0.bias"}
    assert model.state_dict().keys() == {"0.bias"}
    buffers = dict(model.named_buffers())
    assert buffers["0.transform.store.codes"].dtype == torch.uint8
    assert buffers["0.transform.store.codes"].numel() == 17 * 5
    x = torch.randn(2, 3, 23)
    before = model(x)
    model.half()
    assert model[0].transform.store.codes.dtype == torch.uint8
    torch.testing.assert_close(model(x.half()).float(), before, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("packed", [False, True])
def test_faults_flip_packed_codes_alike_in_both_forms(packed: bool) -> None:
    """`ternary+bitflip`: the flips act on bytes of codes, not on floats, and a kept weight may only move on the grid."""
    model = nn.Sequential(linear(bias=False))
    reference = nn.Sequential(linear(bias=False))
    flips = {"type": "bitflip", "weight": {"p": 0.05}, **EVERYWHERE}
    for one, freezes in ((model, packed), (reference, False)):
        ternary(one, flips)
        if freezes:
            freeze(one[0], torch.float32)
    x = torch.eye(23).view(1, 23, 23)
    seen = model(x)
    torch.testing.assert_close(seen, reference(x))
    codes, scale = quantise(reference[0].weight)
    steps = seen[0].t() / scale
    assert set(steps.round().unique().tolist()) <= {-1.0, 0.0, 1.0}
    assert 0 < (steps.round() != codes).float().mean() < 0.6, "some are wrong"


def test_a_flipped_bit_of_a_two_bit_code_moves_one_weight_along_the_grid() -> None:
    """Digits 0, 1, 2 are -1, 0, +1 and 3 reads as +1: bit b of element i changes that weight, and no other."""
    layer = linear(bias=False)
    applied = ternary(nn.Sequential(layer), layout="two_bit")
    [(_, store)] = packed_sites(applied).values()
    stored = store.encode(layer.weight.detach(), "weight")
    whole, scale, seen = store.decode(stored, "weight"), float(stored["scale"]), set()
    for row, column in ((0, 0), (3, 7), (16, 22), *((5, column) for column in range(12))):
        digit = int((whole[row, column] / scale).round()) + 1
        for bit in (0, 1):
            codes = stored["codes"].clone()
            codes[row, column // 4] ^= 1 << (2 * (column % 4) + bit)
            change = store.decode({**stored, "codes": codes}, "weight") - whole
            steps = min(digit ^ 1 << bit, 2) - digit
            assert change[row, column] == pytest.approx(steps * scale)
            change[row, column] = 0
            assert not change.any()
            seen.add((digit, bit))
    assert len(seen) == 6, "every digit and both its bits"


def test_autocast_decides_the_dtype() -> None:
    model = nn.Sequential(linear())
    ternary(model)
    freeze(model[0], torch.float32)
    x = torch.randn(4, 3, 23, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


def test_any_width_and_no_bias_from_nowhere() -> None:
    """Widths that five does not divide need no padding; a layer without a bias gets none (the source's got one)."""
    for features in (1, 4, 5, 64, 128):
        model = nn.Sequential(nn.Linear(features, 3, bias=False))
        ternary(model)
        freeze(model[0], torch.float32)
        assert model(torch.randn(2, 1, features)).shape == (2, 1, 3)
        assert model[0].bias is None


def test_it_compiles() -> None:
    model = nn.Sequential(linear())
    ternary(model)
    x = torch.randn(4, 3, 23)
    graph = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(graph(x), model(x))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"granularity": "group"}, "give both or neither"),
        ({"group_size": 4}, "give both or neither"),
        ({"granularity": "group", "group_size": 0}, "greater than 0"),
        ({"quantiser": "sign"}, "absmean_round"),
        ({"layout": "three_bit"}, "two_bit"),
        ({"sites": {"*": {"group_size": 3}}}, "give both or neither"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        apply(nn.Sequential(linear()), [{"type": "ternary", **EVERYWHERE, **settings}], seed=0)


def test_patterns_change_the_grid_by_layer() -> None:
    model = nn.Sequential(linear(), nn.Linear(17, 5))
    applied = ternary(model, sites={"0": {"granularity": "row"}, "1": None})
    assert applied.report["layers"] == {"0": ["0:ternary:0"]}
    assert model[0].transform.store.settings.granularity == "row"


# -- packed checkpoints ------------------------------------------------------------------------------------------------

SHAPE = {"dim": 20, "layers": 1, "heads": 2, "kv_heads": 1, "ffn": 32, "vocab": 40, "max_seq_len": 8}
TOKENS = torch.arange(16).view(2, 8)


def decoder(**settings: Any) -> tuple[Any, Applied]:
    torch.manual_seed(0)
    model = llama.build(SHAPE).eval()
    applied = apply(model, [{"type": "ternary", **settings}], seed=0)
    applied.context.begin(0, 0)
    return model, applied


@pytest.mark.parametrize("settings", [{}, {"granularity": "group", "group_size": 4}, GRIDS[3]], ids=str)
@torch.no_grad()
def test_a_packed_checkpoint_says_what_latent_weights_say(settings: dict[str, Any], tmp_path: Path) -> None:
    model, applied = decoder(**settings)
    latent = model(TOKENS).logits
    pack(applied)
    sizes = save_packed(tmp_path / "packed", model, applied, torch.float32)["layers"]
    assert sizes["bits_per_weight"] == pytest.approx(sizes["theoretical_bits_per_weight"], rel=0.1)
    assert sizes["bits_per_weight"] < (10 if settings.get("granularity") == "group" else 2.3)
    loaded, again = load_packed(tmp_path / "packed")
    again.context.begin(0, 0)
    torch.testing.assert_close(loaded(TOKENS).logits, latent, rtol=1e-5, atol=1e-5)
    assert sum(p.numel() for name, p in loaded.named_parameters() if "_proj" in name) == 0


@torch.no_grad()
def test_an_evaluation_in_bf16_has_the_codes_of_training(tmp_path: Path) -> None:
    """Rounded to bf16 first, weights at a threshold would take another code than they had in training."""
    model, applied = decoder()
    pack(applied)
    save_packed(tmp_path / "packed", model, applied, torch.bfloat16)
    expected = {name: store.packed("weight") for name, (_, store) in packed_sites(applied).items()}
    torch.manual_seed(0)
    half = llama.build(SHAPE).bfloat16().eval()
    evaluated = apply(half, [{"type": "ternary"}], seed=0)
    own = {n: s.encode(m.weight, "weight")["codes"] for n, (m, s) in packed_sites(evaluated).items()}  # type: ignore[arg-type]
    assert any(not torch.equal(own[name], stored["codes"]) for name, stored in expected.items() if stored)
    pack_for(evaluated, tmp_path / "packed")
    for name, (_, store) in packed_sites(evaluated).items():
        held = store.packed("weight")
        assert held is not None
        assert torch.equal(held["codes"], expected[name]["codes"])  # type: ignore[index]
    evaluated.context.begin(0, 0)
    assert torch.isfinite(half(TOKENS).logits).all()
