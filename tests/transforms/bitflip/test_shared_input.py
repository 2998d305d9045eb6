"""One memory for the input of query, key and value, and of gate and up: loaded once, with one draw."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transform_toys.models import logits, materialise, titan

from pipeline_lib.config.errors import UserError
from pipeline_lib.models.naming import canonical_titan
from pipeline_lib.transforms import bitflip as package
from pipeline_lib.transforms.apply import Applied, apply
from pipeline_lib.transforms.bitflip.faults import BitFlips
from tests.transforms.bitflip.test_bitflip import TOKENS, model

INPUT = {"p": 0.01, "zero_out": 4.0}


def shared(**settings: Any) -> Applied:
    return apply(model(), [{"type": "bitflip", "input": INPUT, "shared_input": True, **settings}], seed=1)


def gradients(applied: Applied, step: int = 0) -> tuple[Tensor, ...]:
    """Logits and gradients of a step."""
    applied.model.zero_grad()
    applied.context.begin(step, 0)
    logits = applied.model(TOKENS).logits
    logits.logsumexp(-1).mean().backward()
    return logits.detach(), *(p.grad for p in applied.model.parameters() if p.grad is not None)


def inputs_seen(applied: Applied) -> dict[str, Tensor]:
    """What reaches the product of every linear layer with weights."""
    seen: dict[str, Tensor] = {}
    multiply = torch.nn.functional.linear
    names = {id(found.module.weight): functions.site.name for found, functions in applied.at}

    def record(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        seen[names.get(id(weight), "")] = input
        return multiply(input, weight, bias)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(torch.nn.functional, "linear", record)
        applied.context.begin(0, 0)
        applied.model(TOKENS)
    return seen


def groups(seen: dict[str, Tensor]) -> set[frozenset[str]]:
    """Layers that multiply the very same tensor."""
    by_tensor: dict[int, set[str]] = {}
    for name, tensor in seen.items():
        by_tensor.setdefault(id(tensor), set()).add(name.removeprefix("model.layers.0."))
    return {frozenset(names) for names in by_tensor.values() if not any("layers.1" in name for name in names)}


def test_the_layers_of_a_group_read_one_tensor() -> None:
    attention = frozenset(f"self_attn.{name}_proj" for name in "qkv")
    feed_forward = frozenset({"mlp.gate_proj", "mlp.up_proj"})
    found = groups(inputs_seen(shared()))
    assert {attention, feed_forward} <= found
    alone = groups(inputs_seen(shared(shared_input=False)))
    assert not {attention, feed_forward} & alone
    assert len(alone) == len(found) + 3


def test_the_first_layer_draws_what_it_drew_alone_and_the_faults_are_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    original = BitFlips.__call__
    monkeypatch.setattr(BitFlips, "__call__", lambda self, *args: drawn.append(1) or original(self, *args))
    one, own = inputs_seen(shared()), inputs_seen(shared(shared_input=False))
    assert len(drawn) == 2 * (7 - 3) + 2 * 7
    first = "model.layers.0.self_attn.q_proj"
    assert torch.equal(one[first], own[first])
    assert not torch.equal(one[first], own[first.replace("q_proj", "k_proj")])


def test_recomputation_gives_the_same_gradients() -> None:
    plain = gradients(shared())
    applied = shared()
    for layer in applied.model.model.layers:  # type: ignore[union-attr]
        forward = layer.forward
        layer.forward = lambda *args, forward=forward, **named: checkpoint(forward, *args, use_reentrant=False, **named)
    again = gradients(applied)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert not torch.equal(gradients(applied, step=1)[0], plain[0])


def test_fewer_tensors_are_saved_for_backward() -> None:
    def saved(applied: Applied) -> int:
        memory: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            memory[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            applied.context.begin(0, 0)
            logits = applied.model(TOKENS).logits
        assert logits.requires_grad
        return sum(memory.values())

    one, own = saved(shared()), saved(shared(shared_input=False))
    a_copy = TOKENS.numel() * 48 * 4
    assert own - one >= 2 * 3 * a_copy, "q, k and v save one flipped input instead of three, gate and up instead of two"


def test_torchtitan_models_have_the_same_groups() -> None:
    torch.manual_seed(0)
    torchtitan = titan()
    entry = {"type": "bitflip", "input": INPUT, "shared_input": True}
    applied = apply(torchtitan, [entry], seed=1, canonical=canonical_titan, global_batch=8)
    materialise(torchtitan)
    applied.prepare()
    applied.context.begin(0, 0)
    around = [type(module).__name__ for module in torchtitan.modules() if module._forward_pre_hooks]
    assert around == ["Attention", "FeedForward"] * (len(around) // 2) != []
    logits(torchtitan, torch.ones(8, 12, dtype=torch.int64)).sum().backward()


def test_removal_restores_the_model() -> None:
    applied = shared()
    before = gradients(applied)[0]
    applied.remove()
    again = apply(applied.model, [{"type": "bitflip", "input": INPUT}], seed=1)
    assert not torch.equal(gradients(again)[0], before)
    assert not any(module._forward_pre_hooks for module in applied.model.model.layers.modules())  # type: ignore[union-attr]


def test_a_layer_that_reads_something_else_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    applied = shared()
    key = applied.model.model.layers[0].self_attn.k_proj  # type: ignore[union-attr]
    forward = type(key).forward
    monkeypatch.setattr(key, "forward", lambda x: forward(key, x + 0))
    with pytest.raises(RuntimeError, match="shared_input"):
        gradients(applied)


@pytest.mark.parametrize(
    "sites",
    [
        {"*.k_proj": None, "*.layers.*": {}},
        {"*.v_proj": {"input": {"p": 0.5}}, "*.layers.*": {}},
        {"*.up_proj": {"shared_input": False}, "*.layers.*": {}},
    ],
)
def test_layers_of_a_group_with_different_settings_are_refused(sites: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="same settings"):
        shared(sites=sites)


def test_a_pattern_without_any_group_is_refused() -> None:
    with pytest.raises(UserError, match="no two layers"):
        shared(sites={"*.down_proj": {}, "*.layers.*": None})
    assert package.Settings.model_validate({}).shared_input is False


def test_a_compiled_model_draws_the_same_and_compiles_once() -> None:
    import torch._dynamo.testing

    torch._dynamo.reset()
    applied = shared()
    layer = applied.model.model.layers[0].mlp  # type: ignore[union-attr]
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x: layer(x), backend=counter, fullgraph=True)  # with its hooks, as in a block
    for step in range(3):
        applied.context.begin(step, 8 * step)
        x = torch.randn(8, 5, 48, generator=torch.Generator().manual_seed(step))
        assert torch.equal(compiled(x), layer(x))
    assert counter.frame_count == 1
