"""The transform on models: settings, sites, and the masks that its faults draw there."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline_lib.config.errors import UserError
from pipeline_lib.transforms import context as context_module
from pipeline_lib.transforms.apply import Applied, apply
from pipeline_lib.transforms.base import Draw, Site
from pipeline_lib.transforms.bitflip import Settings, build
from pipeline_lib.transforms.bitflip.faults import BitFlips
from tests.numerics.flip_checks import all_dependences, count_bits, rate_problem, split_problem

LENGTH = 24
EVERYTHING = {"p": 0.02, "zero_out": 4.0}
TOKENS = torch.randint(1, 61, (8, LENGTH), generator=torch.Generator().manual_seed(0))


def model(layers: int = 2) -> nn.Module:
    """A tiny llama with its head and embeddings, wide enough for statistics on its masks."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 61, "max_position_embeddings": LENGTH}
    return LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.2)).eval()


def bitflip(**settings: Any) -> list[dict[str, Any]]:
    return [{"type": "bitflip", **settings}]


@contextmanager
def recorded(applied: Applied, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Tensor]]:
    """The masks of every site and role of the forward passes inside, as integers."""
    names = {id(fault): functions.site.name for _, functions in applied.at for _, fault in functions.faults}
    masks: dict[str, Tensor] = {}
    original = BitFlips.__call__

    def record(self: BitFlips, tensor: Tensor, role: str, draw: Draw) -> Tensor:
        ungated = dict.fromkeys(self._thresholds)
        with monkeypatch.context() as patch:
            patch.setattr(self, "_thresholds", ungated)
            flipped = original(self, tensor, role, draw)
        masks[f"{names[id(self)]} {role}"] = (
            flipped.view(torch.int32) ^ tensor.contiguous().view(torch.int32)
        ).detach()
        return original(self, tensor, role, draw)

    with monkeypatch.context() as patch:
        patch.setattr(BitFlips, "__call__", record)
        yield masks


def forward(applied: Applied, step: int, first: int, count: int) -> Tensor:
    applied.context.begin(step, first)
    return applied.model(TOKENS[first : first + count]).logits


def masks_of(applied: Applied, monkeypatch: pytest.MonkeyPatch, step: int, first: int, count: int) -> dict[str, Tensor]:
    with recorded(applied, monkeypatch) as masks, torch.no_grad():
        forward(applied, step, first, count)
    return masks


def test_the_layers_are_flipped_and_head_and_embeddings_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    applied = apply(model(), bitflip(weight=EVERYTHING, input=EVERYTHING), seed=1)
    masks = masks_of(applied, monkeypatch, 0, 0, 8)
    projections = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    projections += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    sites = {f"model.layers.{i}.{name}" for i in (0, 1) for name in projections}
    assert set(masks) == {f"{site} {role}" for site in sites for role in ("weight", "input")}
    assert applied.report["histogram"] == {"0:bitflip:*.layer*.*": {"linear": 14}}
    for name, mask in masks.items():
        assert int((mask != 0).sum()) > 0, name


def test_rates_on_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    applied = apply(model(), bitflip(weight={"p": 0.02}, input={"p": 0.01, "p_exp": 0.05}), seed=1)
    counts = {"weight": torch.zeros(32).numpy(), "input": torch.zeros(32).numpy()}
    elements = {"weight": 0, "input": 0}
    for step in range(3):
        for name, mask in masks_of(applied, monkeypatch, step, 0, 8).items():
            role = name.rpartition(" ")[2]
            counts[role] = counts[role] + count_bits(mask, 32)
            elements[role] += mask.numel()
    assert rate_problem(counts["weight"], elements["weight"], 0xFFFFFFFF, 0.02) is None
    assert rate_problem(counts["input"], elements["input"], 0xFF800000, 0.05) is None
    assert rate_problem(counts["input"], elements["input"], 0x007FFFFF, 0.01) is None


def cut(masks: dict[str, Tensor]) -> dict[str, Tensor]:
    """As many elements of each mask as the smallest has, by sequence for activations."""
    shared = 48 * 32
    return {
        f"{name} {row}": mask.reshape(mask.shape[0], -1)[row, : LENGTH * 48][:shared]
        for name, mask in masks.items()
        for row in range(min(2, mask.shape[0]))
        if mask[0].numel() >= LENGTH * 48
    }


def independence_problems(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Shared flips among layers, tensors, steps and sequences of a model."""
    # One p for all, so that masks of two sites are alike in everything but the key.
    applied = apply(model(), bitflip(weight={"p": 0.15}, input={"p": 0.15}), seed=3)
    found: dict[str, Tensor] = {}
    for step in (0, 1):
        masks = cut(masks_of(applied, monkeypatch, step, 0, 8))
        found |= {f"{name} at {step}": mask[: LENGTH * 48] for name, mask in masks.items() if "mlp" in name}
    shortest = min(mask.numel() for mask in found.values())
    return all_dependences({name: mask[:shortest] for name, mask in found.items()}, 32, 0.15)


def test_layers_tensors_steps_and_sequences_share_no_flips(monkeypatch: pytest.MonkeyPatch) -> None:
    assert independence_problems(monkeypatch) == []


def test_mutant_one_seed_for_two_layers_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    original = context_module.site_key
    monkeypatch.setattr(
        context_module, "site_key", lambda seed, site, role: original(seed, site.replace("layers.1", "layers.0"), role)
    )
    problems = independence_problems(monkeypatch)
    assert any("layers.0.mlp" in problem and "layers.1.mlp" in problem for problem in problems)


def test_mutant_one_seed_for_weight_and_input_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    original = context_module.site_key
    monkeypatch.setattr(context_module, "site_key", lambda seed, site, role: original(seed, site, ""))
    assert independence_problems(monkeypatch)


@pytest.mark.parametrize("fault_devices", [1, 2, 4])
def test_splits_of_the_global_batch_draw_the_same_masks(fault_devices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = bitflip(weight=EVERYTHING, input=EVERYTHING)
    applied = apply(model(), settings, seed=1, global_batch=8, fault_devices=fault_devices)

    def honest(first: int, count: int) -> dict[str, Tensor]:
        masks = masks_of(applied, monkeypatch, 5, first, count)
        # With several virtual devices in one pass only the last one's weight is in the record.
        return {name: mask for name, mask in masks.items() if fault_devices == 1 or name.endswith("input")}

    def rank_local(first: int, count: int) -> dict[str, Tensor]:
        with recorded(applied, monkeypatch) as masks, torch.no_grad():
            applied.context.begin(5, 0)
            applied.model(TOKENS[first : first + count])
        return {name: mask for name, mask in masks.items() if name.endswith("input")}

    assert split_problem(honest) is None
    assert split_problem(rank_local) is not None


def test_virtual_devices_draw_their_own_weight_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    applied = apply(model(), bitflip(weight={"p": 0.15}), seed=1, global_batch=8, fault_devices=2)
    by_device = {first: masks_of(applied, monkeypatch, 0, first, 4) for first in (0, 4)}
    again = masks_of(applied, monkeypatch, 0, 5, 1)
    for name, mask in by_device[4].items():
        assert torch.equal(again[name], mask)
        assert all_dependences({"0": by_device[0][name][0], "1": mask[0]}, 32, 0.15) == []


def test_a_mutant_with_the_rank_in_the_seed_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = {rank: apply(model(), bitflip(weight=EVERYTHING, input=EVERYTHING), seed=1 + rank) for rank in (0, 1)}
    assert split_problem(lambda first, count: masks_of(ranks[first // 4], monkeypatch, 0, first, count)) is not None


def test_padding_and_batch_size_change_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    applied = apply(model(), bitflip(weight=EVERYTHING, input=EVERYTHING), seed=1)
    whole = masks_of(applied, monkeypatch, 0, 0, 8)
    with recorded(applied, monkeypatch) as shorter, torch.no_grad():
        applied.context.begin(0, 2)
        applied.model(TOKENS[2:5, :9])
    for name, mask in whole.items():
        expected = mask if name.endswith("weight") else mask[2:5, :9]
        assert torch.equal(shorter[name], expected), name


@pytest.mark.parametrize("gate", [None, 4.0])
def test_gradients_are_those_of_the_gated_operands(gate: float | None) -> None:
    """One linear layer against the formula: y = x' w'ᵀ, dx = [|x'| < t] (g w'), dw = [|w'| < t] (gᵀ x')."""
    torch.manual_seed(0)
    holder = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"f": nn.Linear(40, 30, bias=False)})])})
    linear = holder["layers"][0]["f"]  # type: ignore[index]
    operand = {"p": 0.0, "p_frac": 0.05, "zero_out": gate} if gate is None else {"p": 0.01, "zero_out": gate}
    applied = apply(holder, bitflip(weight=operand, input=operand, sites={"*": {}}), seed=1)
    applied.context.begin(3, 2)
    seen: dict[str, Tensor] = {}
    functions = applied.at[0][1]
    fault = functions.faults[0][1]

    class Spy(BitFlips):
        def __init__(self) -> None:
            self.__dict__.update(fault.__dict__)

        def __call__(self, tensor: Tensor, role: str, draw: Draw) -> Tensor:
            out = super().__call__(tensor, role, draw)
            seen[role] = out.detach()
            thresholds, self._thresholds = self._thresholds, dict.fromkeys(self._thresholds)
            raw = super().__call__(tensor.detach(), role, draw)
            self._thresholds = thresholds
            seen[f"{role} kept"] = raw.abs() < gate if gate else torch.ones_like(raw, dtype=torch.bool)
            return out

    functions.faults[0] = (0, Spy())
    x = torch.randn(4, 9, 40, requires_grad=True)
    y = linear(x)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    weight = seen["weight"][0]
    assert torch.equal(y, seen["input"] @ weight.t())
    assert x.grad is not None
    expected_x = torch.where(seen["input kept"], upstream @ weight, 0.0)
    expected_w = torch.einsum("bto,bti->oi", upstream, seen["input"]) * seen["weight kept"][0]
    assert torch.allclose(x.grad, expected_x, atol=1e-4)
    assert torch.allclose(linear.weight.grad, expected_w, atol=1e-3)
    assert not torch.equal(linear.weight, weight)
    if gate:
        assert not bool(seen["input kept"].all())


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_under_autocast_the_bits_that_the_product_reads_are_flipped(kind: torch.dtype) -> None:
    """Not those of the fp32 weights, most of which rounding would hide: training has the faults of an evaluation."""
    torch.manual_seed(0)
    found, x = [], torch.randn(2, 5, 48, requires_grad=True)
    trained = nn.Sequential(nn.Linear(48, 40, bias=False))
    for layer in (trained, copy.deepcopy(trained).to(kind)):
        settings = bitflip(weight={"p": 0.01, "zero_out": 1.0}, input={"p_frac": 0.2, "zero_out": 9.0}, sites={"*": {}})
        applied = apply(layer, settings, seed=1)
        applied.context.begin(3, 0)
        with torch.autocast("cpu", dtype=kind, enabled=layer is trained):
            found.append(layer(x if layer is trained else x.to(kind)))
    assert found[0].dtype == kind
    assert torch.equal(*found)
    found[0].float().square().sum().backward()
    assert trained[0].weight.grad.dtype == torch.float32  # type: ignore[union-attr]
    assert x.grad is not None
    assert not torch.equal(found[0], torch.nn.functional.linear(x.to(kind), trained[0].weight.to(kind)))  # type: ignore[arg-type]


def test_shapes_are_found_on_the_meta_device() -> None:
    """Which has no autocast to ask about."""
    layer = nn.Sequential(nn.Linear(48, 40, device="meta"))
    applied = apply(layer, bitflip(weight=EVERYTHING, input=EVERYTHING, sites={"*": {}}), seed=1)
    applied.context.begin(0, 0)
    assert layer(torch.empty(2, 5, 48, device="meta")).shape == (2, 5, 40)


def test_every_kind_of_site_flips_only_where_its_operand_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    sites = {
        "embedding:*": {"embedding": {"p": 0.1}},
        "*.query_key": {"left": {"p": 0.1}},
        "*.attention_value": {"right": {"p": 0.1}},
        "kv:*": {"value": {"p": 0.1}},
        "*.layers.1.mlp.*": {"input": {"p": 0.1}},
        "*": {},
    }
    applied = apply(model(), bitflip(sites=sites), seed=1)
    drawn = {name for name, mask in masks_of(applied, monkeypatch, 0, 0, 8).items() if (mask != 0).any()}
    attention = [f"model.layers.{i}.self_attn." for i in (0, 1)]
    expected = {"model.embed_tokens weight"} | {f"model.layers.1.mlp.{n}_proj input" for n in ("gate", "up", "down")}
    for name in attention:
        expected |= {f"{name}query_key left", f"{name}attention_value right", f"{name}kv value"}
    assert drawn == expected


def test_a_pattern_for_an_operand_that_is_not_named_is_an_error() -> None:
    with pytest.raises(UserError, match="matches no site"):
        apply(model(), bitflip(weight={"p": 0.1}, sites={"*.query_key": {}}), seed=1)


def test_integer_codes_of_a_store_flip_without_a_gate() -> None:
    settings = Settings.model_validate({"weight": {"p": 0.05, "p_exp": 0.9, "zero_out": 1.0}})
    fault = build(settings).fault(Site("linear", "x", (4, 4)))
    assert fault is not None
    assert fault.roles == {"weight"}
    codes = torch.zeros(1, 1 << 18, dtype=torch.uint8)
    zero = torch.tensor(0)
    out = fault(codes, "weight", Draw(torch.tensor(5), zero, zero))
    assert rate_problem(count_bits(out.view(torch.int8), 8), 1 << 18, 0xFF, 0.05) is None
    with pytest.raises(UserError, match="float64"):
        fault(torch.zeros(1, 4, dtype=torch.float64), "weight", Draw(zero, zero, zero))


def test_p_zero_changes_nothing() -> None:
    clean = model()
    expected = clean(TOKENS).logits
    applied = apply(clean, bitflip(weight={"p": 0}, input={"p_exp": 0.0}), seed=1)
    assert torch.equal(forward(applied, 0, 0, 8), expected)


def test_a_compiled_model_draws_the_same_and_compiles_once() -> None:
    import torch._dynamo.testing

    torch._dynamo.reset()
    applied = apply(model(1), bitflip(weight=EVERYTHING, input=EVERYTHING), seed=1)
    layer = applied.model.model.layers[0].mlp  # type: ignore[union-attr]
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for step in range(3):
        applied.context.begin(step, 8 * step)
        x = torch.randn(8, 5, 48, generator=torch.Generator().manual_seed(step))
        assert torch.equal(compiled(x), layer(x))
    assert counter.frame_count == 1
