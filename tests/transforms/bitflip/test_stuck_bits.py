"""Persistent faults: maps of stuck bits that are drawn once for a chip, and what they do beside transient flips."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn

from pipeline_lib.config.errors import UserError
from pipeline_lib.config.validate import validate
from pipeline_lib.transforms.apply import Applied, apply
from pipeline_lib.transforms.base import Draw
from pipeline_lib.transforms.bitflip import Settings
from pipeline_lib.transforms.bitflip.faults import BitFlips
from tests.numerics.flip_checks import all_dependences, count_bits, rate_problem

SHAPE = (160, 400)
EVERYWHERE = {"*": {}}


def linear(seed: int = 0, devices: int = 1, layers: int = 1, **settings: Any) -> tuple[Applied, list[nn.Linear]]:
    """Linear layers whose weight is all zeros: what they give for the identity are the faults."""
    made = [nn.Linear(SHAPE[1], SHAPE[0], bias=False) for _ in range(layers)]
    for layer in made:
        nn.init.zeros_(layer.weight)
    entry = {"type": "bitflip", "sites": EVERYWHERE, **settings}
    return apply(nn.ModuleList(made), [entry], seed=seed, global_batch=2, fault_devices=devices), made


def read(applied: Applied, layer: nn.Linear, step: int = 0, first: int = 0) -> Tensor:
    """The weight's bits as the layer reads them, [out, in]."""
    applied.context.begin(step, first)
    functions = layer.functions_at_site
    stored = functions.encode(layer.weight.detach(), "weight")
    return functions.weight(stored, layer.weight.detach(), "weight").view(torch.int32)


def test_stuck_bits_have_their_rates_and_stay() -> None:
    applied, (layer,) = linear(weight={"stuck_at_0": 0.3, "stuck_at_1": 0.1})
    ones = read(applied, layer)
    elements = ones.numel()
    assert rate_problem(count_bits(ones, 32), elements, 0xFFFFFFFF, 0.1) is None
    with torch.no_grad():
        layer.weight.view(torch.int32).fill_(-1)
    zeros = ~read(applied, layer, step=1)
    assert rate_problem(count_bits(zeros, 32), elements, 0xFFFFFFFF, 0.3) is None
    assert not (ones & zeros).any(), "no bit is stuck at both"
    for step, seed in ((7, 0), (7, 3)):
        applied.context.reseed(seed)
        assert torch.equal(~read(applied, layer, step=step), zeros)


def test_another_chip_layer_or_device_is_stuck_elsewhere() -> None:
    stuck = {"weight": {"stuck_at_1": 0.1}}
    applied, (first, second) = linear(devices=2, layers=2, **stuck)
    other, (again, _) = linear(devices=2, layers=2, chip_seed=1, **stuck)
    transient, (flips, _) = linear(devices=2, layers=2, weight={"p": 0.1})
    masks = {
        "one": read(applied, first),
        "another layer": read(applied, second),
        "another device": read(applied, first, first=1),
        "another chip": read(other, again),
        "transient": read(transient, flips),
    }
    assert all_dependences(masks, 32, 0.1) == []
    assert all_dependences({**masks, "one again": read(applied, first, step=5)}, 32, 0.1) != []


@pytest.mark.parametrize(("name", "value"), [("stuck_at_0", 0), ("stuck_at_1", -1)])
def test_a_sure_fault_is_exact(name: str, value: int) -> None:
    applied, (layer,) = linear(weight={name: 1.0, "p": 0.2})
    nn.init.normal_(layer.weight)
    assert (read(applied, layer) == value).all(), "what is stuck does not flip either"


def test_transient_flips_act_where_nothing_is_stuck() -> None:
    both, (layer,) = linear(weight={"p": 0.05, "stuck_at_1": 0.2})
    alone, (plain,) = linear(weight={"p": 0.05})
    chip, (stuck,) = linear(weight={"stuck_at_1": 0.2})
    for step in (0, 1):
        assert torch.equal(read(both, layer, step), read(alone, plain, step) | read(chip, stuck, step))


@pytest.mark.parametrize("gate", [None, 2.0])
def test_the_gradient_passes_what_is_stuck_and_stops_at_the_gate(gate: float | None) -> None:
    operand = {"stuck_at_0": 0.05, "zero_out": gate} if gate is None else {"stuck_at_1": 0.05, "zero_out": gate}
    applied, (layer,) = linear(weight=operand)
    nn.init.normal_(layer.weight)
    ungated = BitFlips.__call__
    applied.context.begin(0, 0)
    out = layer(torch.eye(SHAPE[1]))
    weight = out.detach().T
    out.sum().backward()
    assert layer.weight.grad is not None
    draw = applied.context.weight(0, layer.weight.detach()[None])
    fault = applied.at[0][1].faults[0][1]
    assert isinstance(fault, BitFlips)
    fault._thresholds = {"weight": None}
    raw = ungated(fault, layer.weight.detach()[None], "weight", draw)[0]
    kept = raw.double().abs() < gate if gate else torch.ones_like(raw, dtype=torch.bool)
    assert torch.equal(layer.weight.grad, kept.float())
    assert torch.equal(weight, torch.where(kept, raw, 0.0))
    assert not torch.equal(weight, layer.weight)
    assert bool(kept.all()) == (gate is None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.uint8, torch.int32])
def test_stored_codes_can_be_stuck(dtype: torch.dtype) -> None:
    fault = BitFlips(Settings.model_validate({"weight": {"stuck_at_1": 0.1}}).operands("linear"), chip_seed=3)
    zero = torch.tensor(0)
    out = fault(torch.zeros(1, 1 << 16, dtype=dtype), "weight", Draw(zero, zero, zero, torch.tensor(77)))
    signed = {1: torch.int8, 2: torch.int16, 4: torch.int32}[dtype.itemsize]
    bits = 8 * dtype.itemsize
    assert out.dtype == dtype
    assert rate_problem(count_bits(out.view(signed), bits), 1 << 16, 2**bits - 1, 0.1) is None


def test_compiled_steps_are_the_eager_ones() -> None:
    torch._dynamo.reset()
    applied, (layer,) = linear(weight={"p": 0.01, "stuck_at_0": 0.02, "zero_out": 4.0})
    nn.init.normal_(layer.weight)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for step in range(3):
        applied.context.begin(step, 0)
        results = []
        for module in (compiled, layer):
            layer.weight.grad = None
            out = module(torch.eye(SHAPE[1]))
            out.square().sum().backward()
            results.append((out.detach(), layer.weight.grad))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert counter.frame_count == 1


def test_only_a_chip_needs_no_fault_seeds() -> None:
    def random(**settings: Any) -> bool:
        return Settings.model_validate(settings).random_faults

    assert not random(weight={"stuck_at_0": 0.1, "zero_out": 1.0})
    assert not random(input={"p": 1.0})
    assert random(weight={"stuck_at_0": 0.1}, input={"p": 1e-9})
    assert random(input={"bits": {3: 0.5}})
    assert random(sites={"*.mlp.*": {"embedding": {"p": 0.1}}, "*": {}})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"weight": {"stuck_at_0": 0.7, "stuck_at_1": 0.4}}, ["weight", "at most 1"]),
        ({"weight": {"stuck_at_2": 0.7}}, ["stuck_at_2", "did you mean"]),
        ({"input": {"stuck_at_0": 0.1}}, ["input.stuck_at_0"]),
        ({"weight": {"bits": {i: 0.01 * i for i in range(20)}}}, ["weight", "different probabilities"]),
        ({"chip_seed": -1}, ["chip_seed"]),
    ],
)
def test_wrong_settings_are_told(settings: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        validate(Settings, settings, "config.yaml: transforms.bitflip")
    for word in words:
        assert word in str(error.value)
