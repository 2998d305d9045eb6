"""Which faults are drawn: of batches, ranks, devices, layers and steps; under recomputation, compilation, decoding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transform_toys import fault as toy
from transform_toys.models import LENGTH, MODELS, VOCAB, bert, llama, logits, materialise, titan

from pipeline_lib.models.naming import canonical_titan
from pipeline_lib.transforms.apply import Applied, apply
from pipeline_lib.transforms.context import FaultContext

FAULT = {"type": "toy_fault", "one_in": 16}
Masks = dict[tuple[str, str], list[Tensor]]


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Masks]:
    """The masks drawn since the last call, by (site, role), in order."""
    monkeypatch.setattr(toy, "RECORD", [])

    def taken() -> Masks:
        assert toy.RECORD is not None
        masks: Masks = {}
        for site, role, mask in toy.RECORD:
            masks.setdefault((site, role), []).append(mask)
        toy.RECORD.clear()
        return masks

    return taken


def start(model: nn.Module, entry: dict[str, Any] = FAULT, **settings: Any) -> Applied:
    applied = apply(model, [entry], seed=settings.pop("seed", 0), **settings)
    applied.context.begin(0, 0)
    return applied


WEIGHTS = {"weight"}
# BERT looks its positions up once for all sequences: no fault there may differ between virtual devices.
ENTRIES: dict[str, dict[str, Any]] = {
    "llama": FAULT,
    "bert": {**FAULT, "sites": {"*position_embeddings": None, "*": {}}},
}


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("devices", [1, 2, 4, 8])
@pytest.mark.parametrize("micro", [1, 2, 4, 3])
def test_batching_changes_no_fault(
    family: str, devices: int, micro: int, tokens: Tensor, record: Callable[[], Masks]
) -> None:
    """1 × 8 sequences against micro-batches in the order of ranks: activations and weights, masks and outputs."""
    model = MODELS[family]()
    applied = start(model, ENTRIES[family], global_batch=8, fault_devices=devices)
    whole = logits(model, tokens)
    masks = record()
    firsts = list(range(0, 8, micro))
    order = firsts[1::2] + firsts[::2]  # rank 1 before rank 0: nothing may depend on what came before
    parts: dict[int, Tensor] = {}
    for first in order:
        applied.context.begin(0, first)
        parts[first] = logits(model, tokens[first : first + micro])
        for key, drawn in record().items():
            if key[1] in WEIGHTS:
                share = 8 // devices
                assert all(torch.equal(drawn[i], masks[key][0]) for i in range(len(drawn)) if devices == 1)
                expected = {index // share for index in range(first, min(first + micro, 8))}
                rows = [
                    next(r for r, m in enumerate(_per_device(masks[key], devices)) if torch.equal(m, d)) for d in drawn
                ]
                assert set(rows) == expected
            else:
                assert torch.equal(drawn[0], masks[key][0][first : first + micro]), key
    together = torch.cat([parts[first] for first in firsts])
    assert (together - whole).abs().max() <= 1e-4 * whole.abs().max()


def _per_device(masks: list[Tensor], devices: int) -> list[Tensor]:
    return masks[:: len(masks) // devices]


def test_devices_draw_their_own_weights(tokens: Tensor, record: Callable[[], Masks]) -> None:
    model = llama()
    start(model, global_batch=8, fault_devices=4)
    logits(model, tokens)
    drawn = record()["lm_head", "weight"]
    assert len(drawn) == 4
    for i in range(4):
        for j in range(i):
            assert not torch.equal(drawn[i], drawn[j])


@pytest.mark.parametrize("family", MODELS)
def test_no_two_tensors_share_draws(family: str, tokens: Tensor, record: Callable[[], Masks]) -> None:
    """Layers, roles and entries of a composition; also another step, another seed."""
    model = MODELS[family]()
    dense = {**FAULT, "one_in": 4}
    applied = apply(model, [dense, dense], seed=0)
    seen: set[bytes] = set()
    number = 0
    for seed, step in ((0, 0), (0, 1), (1, 0)):
        applied.context.reseed(seed)
        applied.context.begin(step, 0)
        logits(model, tokens)
        for masks in record().values():
            for mask in masks:
                head = mask.flatten()[:150]
                assert head.any()
                seen.add(bytes(head.to(torch.uint8).tolist()))
                number += 1
    assert len(seen) == number


def test_the_same_step_draws_the_same(tokens: Tensor) -> None:
    model = llama()
    context = start(model).context
    first = logits(model, tokens)
    context.begin(1, 0)
    assert not torch.equal(logits(model, tokens), first)
    context.begin(torch.tensor(0), 0)
    assert torch.equal(logits(model, tokens), first)
    context.reseed(1)
    context.begin(0, 0)
    assert not torch.equal(logits(model, tokens), first)


def test_global_randomness_is_neither_used_nor_moved(tokens: Tensor) -> None:
    model = llama()
    start(model)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = logits(model, tokens)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(4)
    assert torch.equal(logits(model, tokens), first)


@pytest.mark.parametrize("family", MODELS)
def test_right_padding_moves_no_fault(family: str, tokens: Tensor) -> None:
    """A sequence sees the same faults alone, and padded in a batch of longer ones."""
    model = MODELS[family]()
    context = start(model).context
    short = tokens[:, :5]
    mask = torch.zeros_like(tokens)
    mask[:, :5] = 1
    padded = logits(model, torch.where(mask.bool(), tokens, 0), attention_mask=mask)[:, :5]
    alone = []
    for index, sequence in enumerate(short):
        context.begin(0, index)
        alone.append(logits(model, sequence[None]))
    assert (torch.cat(alone) - padded).abs().max() <= 1e-5 * padded.abs().max()


@pytest.mark.parametrize("sites", [{"kv:*": {}}, {"product:*": {}}, {"linear:*": {}}, {"*": {}}], ids=str)
def test_decoding_token_by_token_equals_one_pass(sites: dict[str, Any], tokens: Tensor) -> None:
    model: Any = llama()
    start(model, {**FAULT, "sites": sites})
    with torch.no_grad():
        whole = logits(model, tokens)
        outputs, cache = [], None
        for first, last in ((0, 4), (4, 5), (5, 6), (6, 9), (9, LENGTH)):
            from transformers import DynamicCache

            cache = cache or DynamicCache(config=model.config)
            step = model(tokens[:, first:last], past_key_values=cache, use_cache=True)
            outputs.append(step.logits)
    assert (torch.cat(outputs, 1) - whole).abs().max() <= 1e-4 * whole.abs().max()


def test_generate_equals_greedy_decoding_without_cache(tokens: Tensor) -> None:
    model: Any = llama(eos_token_id=None)
    context = start(model).context
    prompt = tokens[:, :5]
    generated = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False)
    sequence = prompt
    for _ in range(6):
        context.begin(0, 0)
        sequence = torch.cat([sequence, logits(model, sequence)[:, -1:].argmax(-1)], 1)
    assert torch.equal(generated, sequence)


@pytest.mark.parametrize("family", MODELS)
def test_recomputation_draws_the_same(family: str, tokens: Tensor, record: Callable[[], Masks]) -> None:
    """Activation checkpointing, with the backward pass of one micro-batch before the next begins."""
    gradients: list[list[Tensor]] = []
    for checkpointing in (False, True):
        model: Any = MODELS[family]()
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        applied = start(model, ENTRIES[family], global_batch=8, fault_devices=2)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        for step in (0, 1):
            for first in (0, 4):
                applied.context.begin(step, first)
                logits(model, tokens[first : first + 4]).square().mean().backward()
        masks = record()
        name = next(key for key in masks if key[1] == "input" and ".0." in key[0])
        assert len(masks[name]) == (8 if checkpointing else 4)
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) > 10
    for plain, again in zip(*gradients, strict=True):
        assert torch.equal(plain, again)


@pytest.mark.slow
@pytest.mark.parametrize("family", MODELS)
def test_compiled_model_draws_the_same_without_recompiling(family: str, tokens: Tensor) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    model: Any = MODELS[family](num_hidden_layers=1)
    sites = {"*position_embeddings": None} if family == "bert" else {"*q_proj": {}}
    sites |= {
        "embedding:*": {},
        "kv:*": {},
        "product:*": {},
        "*predictions.decoder" if family == "bert" else "lm_head": {},
    }
    entries = [{"type": "toy_store", "levels": 100, "sites": sites}, {**FAULT, "sites": sites}]
    applied = apply(model, entries, seed=0, global_batch=8, fault_devices=4)
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for step, first in ((0, 0), (0, 4), (1, 0), (900, 4)):
        applied.context.begin(step, first)
        part = tokens[first : first + 4]
        model.zero_grad()
        eager = logits(model, part)
        eager.square().mean().backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        fast = logits(compiled, part)
        fast.square().mean().backward()
        assert (fast - eager).abs().max() <= 1e-5 * eager.abs().max()
        for one, other in zip(gradients, [p.grad for p in model.parameters() if p.grad is not None], strict=True):
            assert (one - other).abs().max() <= 1e-4 * one.abs().max()
    assert counter.frame_count == 1


def test_a_late_backward_is_safe(tokens: Tensor) -> None:
    """Two forward passes before the first backward: the second `begin` must not disturb the first's tensors."""
    model = bert()
    context = start(model).context
    first = logits(model, tokens)
    context.begin(1, 0)
    second = logits(model, (tokens + 1) % VOCAB)
    (first.square().mean() + second.square().mean()).backward()


def test_without_faults_the_context_does_not_matter(tokens: Tensor) -> None:
    model = llama()
    apply(model, [{"type": "toy_store", "levels": 9}], seed=0)
    before = logits(model, tokens)
    model2 = llama()
    apply(model2, [{"type": "toy_store", "levels": 9}], seed=5).context.begin(7, 3)
    assert torch.equal(logits(model2, tokens), before)


def test_torchtitan_draws_what_hugging_face_draws(tokens: Tensor, record: Callable[[], Masks]) -> None:
    """The same sites, whoever built the model: a checkpoint meets the same faults in training and evaluation."""
    model = llama(intermediate_size=48)
    start(model, global_batch=8, fault_devices=2)
    logits(model, tokens)
    expected = record()
    model = titan()
    applied = apply(model, [FAULT], seed=0, canonical=canonical_titan, global_batch=8, fault_devices=2)
    materialise(model)
    applied.prepare()
    applied.context.begin(0, 0)
    logits(model, tokens)
    drawn = record()
    assert drawn.keys() == expected.keys()
    for key, masks in expected.items():
        assert len(masks) == len(drawn[key])
        assert all(torch.equal(a, b) for a, b in zip(masks, drawn[key], strict=True)), key


def test_announcing_a_pass_waits_for_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers are filled in on a GPU, not copied to it: a copy from pageable memory waits for all it has to do."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode

    copies: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in (torch.ops.aten._to_copy.default, torch.ops.aten._local_scalar_dense.default):
                copies.append(str(func))
            return func(*args, **(kwargs or {}))

    sent: list[int] = []
    monkeypatch.setattr("pipeline_lib.transforms.context._sent", lambda keys, _: sent.append(len(keys)) or keys)
    context = FaultContext(seed=0, global_batch=8)
    context.stream("a", "weight", chip_seed=3)
    context.stream("b", "input")
    context.on(lambda: torch.device("cuda"))
    with FakeTensorMode(), Watch():
        for step in range(2):
            context.begin(step, 4, position=2)
    assert context.position.device.type == "cuda"
    assert sent == [2, 2], "the keys of a step go in one piece"
    assert copies == []
