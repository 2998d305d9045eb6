"""The transform on models: latent and packed weights say the same, faults act on codes, settings reach the layers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline_lib.artifacts.files import read_json
from pipeline_lib.config.base import Settings as Base
from pipeline_lib.config.errors import UserError
from pipeline_lib.config.registry import TRANSFORMS
from pipeline_lib.config.validate import validate
from pipeline_lib.models import llama
from pipeline_lib.numerics.packing import unpack
from pipeline_lib.transforms.apply import Applied, apply
from pipeline_lib.transforms.base import Draw
from pipeline_lib.transforms.bitflip.faults import BitFlips
from pipeline_lib.transforms.int2 import Settings
from pipeline_lib.transforms.int2.store import GroupedStore
from pipeline_lib.transforms.observe import absorb, load_calibrated
from pipeline_lib.transforms.packed import load_packed, pack, pack_for, packed_sites, save_packed
from pipeline_lib.transforms.state import transform_state

SHAPE = {"dim": 64, "layers": 2, "heads": 4, "kv_heads": 2, "ffn": 96, "vocab": 80, "max_seq_len": 16}
TOKENS = torch.arange(32).view(2, 16)
LAYERS = 2 * 7


def model(tied: bool = False) -> Any:
    torch.manual_seed(0)
    made = llama.build(SHAPE)
    if tied:
        made.config.tie_word_embeddings = True
        made.tie_weights()
    return made.eval()


def transformed(
    tied: bool = False, *, transform: list[dict[str, Any]] | None = None, **settings: Any
) -> tuple[Any, Applied]:
    made = model(tied)
    applied = apply(made, transform or [{"type": "int2", "group_size": 32, **settings}], seed=0)
    applied.context.begin(0, 0)
    return made, applied


@torch.no_grad()
def logits(made: nn.Module) -> Tensor:
    return made(TOKENS).logits


def store_of(applied: Applied, name: str) -> GroupedStore:
    store = packed_sites(applied)[name][1]
    assert isinstance(store, GroupedStore)
    return store


@pytest.mark.parametrize("name", ["int2-asym", "int3-asym", "int4-asym", "int8-asym", "n2f3"])
@pytest.mark.parametrize("group_size", [32, -1, 20, 1000])
def test_packed_weights_say_what_latent_ones_say(name: str, group_size: int, tmp_path: Path) -> None:
    """In memory, and read from the packed checkpoint: one rounding rule."""
    made, applied = transformed(format=name, group_size=group_size)
    latent = logits(made)
    assert (latent - logits(model())).abs().max() > 1e-3 or name == "int8-asym", "the transform acts"
    pack(applied)
    assert (logits(made) - latent).abs().max() < 1e-5
    save_packed(tmp_path / "packed", made, applied, torch.float32)
    loaded, again = load_packed(tmp_path / "packed")
    again.context.begin(0, 0)
    assert (logits(loaded) - latent).abs().max() < 1e-5


def test_all_layers_and_nothing_else_by_default() -> None:
    """Query and key projections are quantised too; embedding and output layer are not."""
    _, applied = transformed()
    assert len(applied.report["layers"]) == LAYERS
    assert {name.rpartition(".")[2] for name in applied.report["layers"]} >= {"q_proj", "k_proj"}
    assert applied.report["histogram"] == {"0:int2:linear:*.layer*.*": {"linear": LAYERS}}


def test_a_packed_model_has_no_float_weights(tmp_path: Path) -> None:
    made, applied = transformed()
    pack(applied)
    save_packed(tmp_path / "packed", made, applied, torch.bfloat16)
    state = load_file(tmp_path / "packed" / "packed.safetensors")
    assert not any(name.endswith("_proj.weight") for name in state)
    assert state["model.layers.0.mlp.up_proj.transform.store.codes"].shape == (96, 16)
    loaded, _ = load_packed(tmp_path / "packed", "bfloat16")
    layers = sum(p.numel() for name, p in loaded.named_parameters() if "_proj" in name)
    assert layers == 0
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}


def test_the_quantisation_stands_in_the_configuration(tmp_path: Path) -> None:
    """A loader that does not know it must not take the packed checkpoint for a plain one."""
    from transformers import AutoModelForCausalLM

    made, applied = transformed()
    pack(applied)
    save_packed(tmp_path / "packed", made, applied, torch.float32)
    about = read_json(tmp_path / "packed" / "config.json")["quantization_config"]
    assert about["quant_method"] == "errata"
    [entry] = about["transform"]
    assert (entry["format"], entry["group_size"], entry["scale_dtype"]) == ("int2-asym", 32, "float16")
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed")


def test_another_transform_is_refused(tmp_path: Path) -> None:
    made, applied = transformed()
    pack(applied)
    save_packed(tmp_path / "packed", made, applied, torch.float32)
    with pytest.raises(UserError, match="another transform"):
        load_packed(tmp_path / "packed", transform=[{"type": "int2", "group_size": 64}])


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_embedding_and_head(bits: int, tied: bool, tmp_path: Path) -> None:
    """Their bits are settings; a tied weight is stored once, quantised or not."""
    sizes = {}
    for chosen in (16, bits):
        made, applied = transformed(tied, embedding=chosen, head=chosen)
        latent = logits(made)
        pack(applied)
        assert (logits(made) - latent).abs().max() < 1e-5
        folder = tmp_path / str(chosen)
        sizes[chosen] = save_packed(folder, made, applied, torch.float16)
        state = load_file(folder / "packed.safetensors")
        heads = [name for name in state if name.startswith("lm_head")]
        assert bool(heads) is not tied, "one weight, one place"
        loaded, again = load_packed(folder)
        again.context.begin(0, 0)
        assert (logits(loaded) - latent).abs().max() < 2e-3
    row = sizes[bits]["embedding"]
    assert row["weights"] == 80 * 64
    assert row["theoretical_bits_per_weight"] == bits + (16 + bits) / 32
    assert ("head" in sizes[bits]) is not tied
    assert sizes[bits]["total"]["bytes"] < sizes[16]["total"]["bytes"]


def test_a_tied_weight_cannot_have_two_widths() -> None:
    with pytest.raises(UserError, match="must have the same bits"):
        transformed(True, embedding=8)


def test_sizes_are_those_of_the_tensors(tmp_path: Path) -> None:
    """Beside the theory: what is above it is padding of zero points to whole bytes."""
    made, applied = transformed()
    pack(applied)
    sizes = save_packed(tmp_path / "packed", made, applied, torch.float16)
    state = load_file(tmp_path / "packed" / "packed.safetensors")
    assert sizes["total"]["bytes"] == sum(t.numel() * t.element_size() for t in state.values())
    row = sizes["layers"]
    assert row["theoretical_bits_per_weight"] == 2 + 18 / 32
    padding = sum(store.shape[0] * (8 - 2 * store.groups) for _, store in _grouped(applied))
    assert 8 * row["bytes"] == row["theoretical_bits_per_weight"] * row["weights"] + padding


def _grouped(applied: Applied) -> list[tuple[nn.Module, GroupedStore]]:
    return [(module, store) for module, store in packed_sites(applied).values() if isinstance(store, GroupedStore)]


@pytest.mark.parametrize("name", ["int2-asym", "n2f3"])
def test_the_gradient_reaches_latent_weights(name: str) -> None:
    """Through the whole model: no element of a searched direction is dead, and a step changes codes in the end."""
    made, applied = transformed(format=name)
    made.train()
    loss = made(input_ids=TOKENS, labels=TOKENS).loss
    loss.backward()
    for module, _ in packed_sites(applied).values():
        weight: Any = module.weight
        assert weight.grad is not None
        assert (weight.grad != 0).float().mean() > 0.9


def test_packed_weights_are_no_parameters_and_no_state() -> None:
    """Optimizers and checkpoints of trainings never see codes."""
    made, applied = transformed(clip={})
    before = {name for name, _ in made.named_parameters()}
    state = set(transform_state(made))
    pack(applied)
    assert {name for name, _ in made.named_parameters()} == before
    assert set(transform_state(made)) == state
    assert state
    assert all(name.endswith((".minimum", ".maximum")) for name in state)


def test_a_packed_layer_passes_gradients_to_its_input() -> None:
    layer = nn.Linear(64, 32)
    applied = apply(nn.Sequential(layer), [{"type": "int2", "group_size": 32, "sites": {"*": {}}}], seed=0)
    applied.context.begin(0, 0)
    x = torch.randn(1, 3, 64, requires_grad=True)
    [expected] = torch.autograd.grad(layer(x).square().sum(), x)
    pack(applied)
    [got] = torch.autograd.grad(layer(x).square().sum(), x)
    assert torch.allclose(got, expected, atol=1e-5)


# ---- faults on codes


class OneBit(BitFlips):
    """Flips one bit of one byte of the stored tensor."""

    def __init__(self, byte: int, bit: int) -> None:
        self.roles = frozenset({"weight"})
        self.byte, self.bit = byte, bit

    def __call__(self, tensor: Tensor, role: str, draw: Draw) -> Tensor:
        assert tensor.dtype == torch.uint8, "faults see codes"
        flipped = tensor.clone()
        flipped.view(-1)[self.byte] ^= 1 << self.bit
        return flipped


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["int2-asym", "int4-asym", "int8-asym"])
def test_a_flipped_bit_of_a_code_moves_one_weight_by_a_grid_step(name: str, packed: bool) -> None:
    """Bit b of element i: that weight, and no other, changes by exactly 2^b steps of its group."""
    layer = nn.Linear(48, 6, bias=False)
    linear = nn.Sequential(layer)
    applied = apply(linear, [{"type": "int2", "format": name, "group_size": 16, "sites": {"*": {}}}], seed=0)
    applied.context.begin(0, 0)
    [(_, at_site)] = applied.at
    functions: Any = at_site
    store: Any = functions.store
    bits, eye = store.grid.bits, torch.eye(48)
    stored = store.encode(layer.weight.detach(), "weight")
    codes = unpack(stored["codes"], bits, 48)
    if packed:
        pack(applied)
    with torch.no_grad():
        whole = linear(eye).T
        for element in (0, 5, 47, 48, 6 * 48 - 1):
            row, column = divmod(element, 48)
            for bit in range(bits):
                position = row * 48 * bits + column * bits + bit
                functions.faults = [(1, OneBit(position // 8, position % 8))]
                functions._streams = {(1, "weight", "codes"): applied.context.stream("s", "weight.codes/1")}
                applied.context.begin(0, 0)
                change = linear(eye).T - whole
                sign = -1 if int(codes[row, column]) >> bit & 1 else 1
                step = stored["scale"][row, column // 16].float() * 2**bit * sign
                assert change[row, column] == pytest.approx(float(step), rel=1e-5)
                change[row, column] = 0
                assert not change.any()


def test_int2_and_bitflip_compose() -> None:
    """Each bit of a code flips with the probability asked for; scales and zero points do not."""
    flips = {"type": "bitflip", "weight": {"p": 0.1}, "input": {"p": 0.0}}
    made, applied = transformed(transform=[{"type": "int2", "group_size": 32}, flips])
    clean, _ = transformed()
    assert (logits(made) - logits(clean)).abs().max() > 1e-3
    [functions] = [f for found, f in applied.at if found.site.name == "model.layers.0.mlp.up_proj"]
    weight = made.model.layers[0].mlp.up_proj.weight.detach()
    stored = functions.encode(weight, "weight")
    faulty = functions.faulty(stored, "weight")
    differing = stored["codes"] ^ faulty["codes"]
    count = sum(int((differing >> bit & 1).sum()) for bit in range(8))
    expected, total = 0.1 * differing.numel() * 8, differing.numel() * 8
    assert abs(count - expected) < 5 * (total * 0.09) ** 0.5
    assert torch.equal(stored["scale"], faulty["scale"])
    assert torch.equal(stored["zero"], faulty["zero"])
    before = logits(made)
    pack(applied)
    assert (logits(made) - before).abs().max() < 1e-5, "packed weights have the same faults"


def test_training_under_flips_has_gradients() -> None:
    flips = {"type": "bitflip", "weight": {"p": 0.01}, "input": {"p": 0.0}}
    made, applied = transformed(transform=[{"type": "int2", "group_size": 32}, flips])
    made.train()
    made(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in made.parameters())
    assert all(module.weight.grad.any() for module, _ in packed_sites(applied).values())  # type: ignore[union-attr]


# ---- ranges


def test_ranges_are_state_and_bound_the_weights(tmp_path: Path) -> None:
    made, applied = transformed(clip={})
    unclipped = logits(made)
    name = "model.layers.0.mlp.up_proj"
    weight = packed_sites(applied)[name][0].weight
    assert isinstance(weight, Tensor)
    bound = weight.detach().abs().max() / 2
    prefix = f"{name}.transform.store."
    state = {
        prefix + "minimum": torch.full((96, 2), -float(bound)),
        prefix + "maximum": torch.full((96, 2), float(bound)),
    }
    load_calibrated(applied, state)
    assert torch.equal(transform_state(made)[prefix + "minimum"], state[prefix + "minimum"])
    clipped = logits(made)
    assert (clipped - unclipped).abs().max() > 1e-4
    by_hand = transformed()[0]
    with torch.no_grad():
        by_hand.model.layers[0].mlp.up_proj.weight.clamp_(-bound, bound)
    assert torch.equal(logits(by_hand), clipped)
    pack(applied)
    save_packed(tmp_path / "packed", made, applied, torch.float32)
    loaded, again = load_packed(tmp_path / "packed")
    again.context.begin(0, 0)
    assert (logits(loaded) - clipped).abs().max() < 1e-5
    absorb(applied)
    assert torch.isinf(transform_state(made)[prefix + "minimum"]).all(), "a training's range is that of its weights"
    assert weight.abs().max() <= bound


def test_ranges_of_other_shapes_are_refused() -> None:
    _, applied = transformed(clip={})
    with pytest.raises(UserError, match="does not belong"):
        load_calibrated(applied, {"model.layers.0.mlp.up_proj.transform.store.minimum": torch.zeros(96, 3)})


def test_query_and_key_are_not_searched_unless_asked() -> None:
    _, applied = transformed(clip={})
    searched = {name.rpartition(".")[2] for name, (_, store) in packed_sites(applied).items() if store.calibrated}
    assert searched == {"v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    _, applied = transformed(clip={"skip": []})
    assert all(store.calibrated for _, store in packed_sites(applied).values())


# ---- one rounding rule


def test_an_evaluation_in_bf16_has_the_codes_of_training(tmp_path: Path) -> None:
    """Codes come from the packed checkpoint, made from fp32; weights rounded to bf16 would give some others."""
    made, applied = transformed()
    pack(applied)
    save_packed(tmp_path / "packed", made, applied, torch.float32)
    rounded = copy.deepcopy(model()).to(torch.bfloat16)
    own, fresh = apply(rounded, [{"type": "int2", "group_size": 32}], seed=0), 0
    pack(own)
    for name, (_, store) in packed_sites(applied).items():
        fresh += int((store_of(own, name).packed("weight")["codes"] != store.packed("weight")["codes"]).sum())  # type: ignore[index]
    assert fresh > 0, "rounding first changes codes, so the test can fail"
    pack_for(own, tmp_path / "packed")
    for name, (_, store) in packed_sites(applied).items():
        for part, tensor in (store.packed("weight") or {}).items():
            assert torch.equal((store_of(own, name).packed("weight") or {})[part], tensor)
    own.context.begin(0, 0)
    assert logits(rounded).dtype == torch.bfloat16


def test_a_packed_checkpoint_of_another_transform_is_not_taken(tmp_path: Path) -> None:
    made, applied = transformed()
    pack(applied)
    save_packed(tmp_path / "packed", made, applied, torch.float32)
    other, own = transformed(group_size=16)
    expected = logits(other)
    pack_for(own, tmp_path / "packed")
    assert (logits(other) - expected).abs().max() < 1e-5


# ---- settings


def test_settings_survive_a_spec() -> None:
    """What `embedding` and `head` add to the sites is added once."""
    settings = Settings.model_validate({"embedding": 8, "head": 4, "sites": {"*.mlp.*": {"group_size": 64}}})
    assert [pattern for pattern, _ in settings.sites] == ["*.mlp.*", "embedding:*", "linear:lm_head"]
    again = validate(Settings, settings.semantic(), "spec")
    assert isinstance(again, Base)
    assert again.semantic() == settings.semantic()
    assert TRANSFORMS.load("int2").calibration(Settings()) is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"group_size": 0}, "group_size"),
        ({"format": "fp4"}, "format"),
        ({"embedding": 2}, "embedding"),
        ({"clip": {"grid": 0}}, "grid"),
        ({"sites": {"*": {"bits": 2}}}, "bits"),
    ],
)
def test_wrong_settings_name_the_key(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        validate(Settings, {"type": "int2", **given}, "transforms.int2")
