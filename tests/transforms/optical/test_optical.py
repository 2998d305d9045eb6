"""What the transform does to a model: causality, heads, masks, cache, ranges, gradients, ramp."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transform_toys.models import MODELS, VOCAB, llama, logits, materialise, titan

from pipeline_lib.config.errors import UserError
from pipeline_lib.config.validate import validate
from pipeline_lib.models.naming import canonical_titan
from pipeline_lib.transforms.apply import Applied, apply
from pipeline_lib.transforms.observe import load_observed, watch
from pipeline_lib.transforms.optical.compute import OpticalProduct
from pipeline_lib.transforms.optical.settings import Settings
from pipeline_lib.transforms.state import transform_state


def crammed() -> torch.nn.Module:
    """The crammed BERT of pipeline_lib."""
    from pipeline_lib.models.crammed_bert import CrammedBertConfig, CrammedBertForMaskedLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = CrammedBertForMaskedLM(CrammedBertConfig(**sizes, vocab_size=VOCAB))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(10)  # logits that depend on the layers
    return model.eval()


FAMILIES = {**MODELS, "crammed": crammed}
FINE = {"type": "optical", "levels": 2**20, "lut_min": None}
COARSE = {"type": "optical", "levels": 16}


def calibrated(model: Any, tokens: Tensor, settings: dict[str, Any]) -> Applied:
    applied = apply(model, [settings], seed=0, global_batch=len(tokens))
    watch(applied, model, [tokens])
    applied.context.begin(0, 0)
    return applied


@pytest.mark.parametrize("family", FAMILIES)
def test_with_fine_levels_the_model_computes_what_it_did(family: str, tokens: Tensor) -> None:
    """Heads, grouped keys, positions and scale are where they were; attention drops nothing in evaluation."""
    model = FAMILIES[family]()
    before = logits(model, tokens)
    calibrated(model, tokens, FINE)
    after = logits(model, tokens)
    assert (after - before).abs().max() < 1e-4 * before.abs().max()
    assert not torch.equal(after, before), "but it is quantised"


def test_with_fine_levels_torchtitans_model_computes_what_it_did(tokens: Tensor) -> None:
    plain = materialise(titan())
    before = logits(plain, tokens)
    model: Any = titan()
    applied = apply(model, [FINE], seed=0, canonical=canonical_titan)
    materialise(model)
    applied.prepare()  # what `to_empty` left in memory is no range
    assert all(not function.ranges.isnan().any() for function in products(applied))
    model.train()
    applied.context.begin(0, 0)
    exact = logits(model, tokens)
    torch.testing.assert_close(exact, before, rtol=1e-5, atol=1e-5)
    applied.settle()
    model.eval()
    applied.context.begin(0, 0)
    assert (logits(model, tokens) - before).abs().max() < 1e-4 * before.abs().max()


def products(applied: Applied) -> list[OpticalProduct]:
    return [function for _, at in applied.at for function in at.functions() if isinstance(function, OpticalProduct)]


@pytest.mark.parametrize("training", [True, False])
def test_no_token_sees_a_later_one(training: bool, tokens: Tensor) -> None:
    """Neither through the mask nor through ranges: those of a pass come from the steps before it."""
    model = llama()
    applied = calibrated(model, tokens, COARSE)
    model.train(training)
    other = tokens.clone()
    other[:, 7:] = (other[:, 7:] * 31 + 5) % VOCAB
    applied.context.begin(1, 0)
    before = logits(model, tokens)
    applied.context.begin(1, 0)
    after = logits(model, other)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.isclose(before[:, 7:], after[:, 7:]).all()


def test_torchtitans_model_sees_no_later_token_from_its_first_step_on(tokens: Tensor) -> None:
    model: Any = titan()
    applied = apply(model, [COARSE], seed=0, canonical=canonical_titan)
    materialise(model).train()
    applied.prepare()
    other = tokens.clone()
    other[:, -1] = (other[:, -1] + 1) % VOCAB
    for step in range(2):
        seen = []
        for given in (tokens, other):
            applied.context.begin(step, 0)
            seen.append(logits(model, given)[:, :-1])
        assert torch.equal(*seen), step
        applied.settle()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_seen(family: str, side: str, tokens: Tensor) -> None:
    model = FAMILIES[family]()
    mask = torch.ones_like(tokens)
    hidden = slice(0, 4) if side == "left" else slice(-4, None)
    mask[2, hidden] = 0
    calibrated(model, tokens, COARSE)
    other = tokens.clone()
    other[2, hidden] = (other[2, hidden] + 7) % VOCAB
    before, after = (logits(model, given, attention_mask=mask) for given in (tokens, other))
    assert torch.equal(before[mask.bool()], after[mask.bool()])


@pytest.mark.parametrize("size", [1, 5])
def test_decoding_with_a_cache_gives_each_token_its_own_noise(size: int, tokens: Tensor) -> None:
    """Token by token, or several at once behind what is cached."""
    model: Any = llama()
    applied = calibrated(model, tokens, {**COARSE, "levels": 64})
    whole = logits(model, tokens)
    applied.context.begin(0, 0)
    cache, parts = None, []
    for piece in tokens.split(size, dim=1):
        output = model(piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.logits)
    # A sum in another order may fall on the other side of a tie: few elements, by a level.
    assert torch.isclose(torch.cat(parts, 1), whole, atol=1e-4).double().mean() > 0.97


def test_how_a_batch_is_cut_changes_neither_results_nor_ranges(tokens: Tensor) -> None:
    wholes, parts = [], []
    for size, found in ((8, wholes), (2, parts)):
        model = llama().train()
        applied = calibrated(model, tokens, {**COARSE, "quantiles": [0.01, 0.99]})
        for step in range(3):
            outputs = []
            for first in range(0, 8, size):
                applied.context.begin(step, first)
                outputs.append(logits(model, tokens[first : first + size]).detach())
            applied.settle()
            found.append(torch.cat(outputs))
        found.append(torch.stack([function.ranges.clone() for function in products(applied)]))
    assert torch.isclose(wholes[0], parts[0], atol=1e-4).double().mean() > 0.97
    torch.testing.assert_close(wholes[-1], parts[-1], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("family", MODELS)
def test_recomputed_activations_are_the_same(family: str, tokens: Tensor) -> None:
    found = []
    for checkpointing in (False, True):
        model: Any = MODELS[family]()
        applied = calibrated(model, tokens, {**COARSE, "gate": True})
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        applied.context.begin(4, 0)
        logits(model, tokens).square().mean().backward()
        seen = torch.stack([function.seen.clone() for function in products(applied)])
        applied.settle()
        ranges = torch.stack([function.ranges.clone() for function in products(applied)])
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found.append((seen, ranges, *gradients))
    assert len(found[0]) == len(found[1])
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


def test_an_uncalibrated_evaluation_says_what_to_do(tokens: Tensor) -> None:
    model = llama()
    applied = apply(model, [COARSE], seed=0)
    applied.context.begin(0, 0)
    with pytest.raises(UserError, match=r"q_proj: the ranges .* not known(.|\n)*fix: .*calibrated"):
        logits(model, tokens)
    watch(applied, model, [tokens])
    logits(model, tokens)


def test_noise_differs_between_sites_steps_and_seeds_and_leaves_torchs_generator_alone(tokens: Tensor) -> None:
    model = llama()
    applied = calibrated(model, tokens, COARSE)
    generator = torch.get_rng_state()
    first = logits(model, tokens)
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.equal(first, logits(model, tokens))
    applied.context.begin(1, 0)
    assert not torch.equal(first, logits(model, tokens))
    applied.context.reseed(1)
    applied.context.begin(0, 0)
    assert not torch.equal(first, logits(model, tokens))
    applied.remove()
    calibrated(model, tokens, {**COARSE, "dither": False})
    assert not torch.equal(first, logits(model, tokens))
    assert validate(Settings, COARSE, "x").random_faults
    assert not validate(Settings, {**COARSE, "dither": False}, "x").random_faults


def test_products_and_layers_of_every_block_are_optical_and_heads_and_embeddings_are_not(tokens: Tensor) -> None:
    from transformers import BertForSequenceClassification

    encoder: Any = MODELS["bert"]()
    classifier = BertForSequenceClassification(encoder.config)
    for model, layers in ((llama(), 7), (encoder, 6), (classifier, 6), (crammed(), 6)):
        report = apply(model, [COARSE], seed=0).report
        assert report["histogram"] == {
            "0:optical:linear:*.layer*.*": {"linear": 2 * layers},
            "0:optical:product:*.layer*.*": {"product": 4},
        }
        assert all(".layer" in name for name in report["layers"])


def test_scores_have_a_range_of_their_own_before_they_are_scaled(tokens: Tensor) -> None:
    """As they are rounded; and it moves after the first step as well."""
    model: Any = llama()
    scores: list[Tensor] = []
    applied = apply(model, [{**FINE, "smoothing": 0.5}], seed=0, global_batch=8)
    product = next(p for p in products(applied) if p.site == "model.layers.0.self_attn.query_key")
    product.register_forward_pre_hook(lambda _, given: scores.append(given[0] @ given[1]))
    model.train()
    for step in range(2):
        applied.context.begin(step, 0)
        logits(model, tokens)
        before = product.ranges[2].clone()
        applied.settle()
        seen = torch.stack([scores[-1].min(), scores[-1].max()])
        torch.testing.assert_close(product.ranges[2], seen if step == 0 else (before + seen) / 2, rtol=1e-3, atol=0)
        model.model.layers[0].self_attn.q_proj.weight.data.mul_(3)


def test_no_pass_and_no_settling_waits_for_the_device(tokens: Tensor) -> None:
    """On the meta device whoever asks for a value gets an error, as a GPU would be waited for."""
    model: Any = llama().train()
    applied = apply(model, [{**COARSE, "gate": True, "ramp": {"steps": 5}}], seed=0, global_batch=8)
    applied.context.begin(0, 0)
    model.to("meta")
    for name in ("step", "first_sequence", "position", "_keys"):
        setattr(applied.context, name, getattr(applied.context, name).to("meta"))
    logits(model, tokens.to("meta")).sum().backward()
    applied.settle()
    assert all(p.grad is not None for p in model.parameters())


if torch.cuda.is_available():  # elsewhere the test above says as much of the pass, and nothing of what precedes it

    def test_nothing_in_a_step_waits_for_the_gpu(tokens: Tensor) -> None:
        model: Any = llama().cuda().train()
        applied = apply(model, [{**COARSE, "gate": True, "ramp": {"steps": 5}}], seed=0, global_batch=8)
        given = tokens.cuda()
        for step in range(4):
            torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")  # kernels are compiled before
            try:
                applied.context.begin(step, 0)
                logits(model, given).sum().backward()
                applied.settle()
            finally:
                torch.cuda.set_sync_debug_mode("default")


def test_state_lives_under_transform_and_training_goes_on_from_it(tokens: Tensor) -> None:
    model = llama()
    applied = calibrated(model, tokens, COARSE)
    state = transform_state(model)
    assert "model.layers.1.self_attn.transform.query_key.compute.ranges" in state
    assert "model.layers.0.mlp.down_proj.transform.compute.ranges" in state
    assert set(watch(applied, model, [tokens])) == set(state)
    state = {name: tensor.clone() for name, tensor in state.items()}
    applied.remove()
    again = apply(model, [COARSE], seed=0)
    load_observed(again, state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in transform_state(model).items())


def test_weights_in_faulty_memory_meet_in_optical_products(tokens: Tensor) -> None:
    """A composition, with virtual devices: each share of the batch draws weight faults and noise of its own."""
    flips = {"type": "bitflip", "weight": {"p_frac": 0.05}}
    outputs = []
    for pieces in (1, 4):
        model = llama()
        applied = apply(model, [flips, {**COARSE, "levels": 2**16}], seed=0, global_batch=8, fault_devices=4)
        watch(applied, model, [tokens])
        applied.context.begin(0, 0)
        parts = []
        for number, part in enumerate(tokens.chunk(pieces)):
            applied.context.begin(0, number * len(part))
            parts.append(logits(model, part))
        outputs.append(torch.cat(parts))
    assert torch.isclose(*outputs, atol=1e-3).double().mean() > 0.99


def test_a_compiled_model_has_the_same_noise_and_no_graph_break(tokens: Tensor) -> None:
    model: Any = llama()
    applied = calibrated(model, tokens, {**COARSE, "gate": True, "ramp": {"steps": 9}})
    model.train()
    results = []
    block = torch.nn.Sequential(model.model.layers[0].mlp)
    x = torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(0))
    for run in (block, torch.compile(block, backend="aot_eager", fullgraph=True)):
        for step in (1, 2):
            applied.context.begin(step, 0)
            leaf = x.clone().requires_grad_()
            y = run(leaf)
            y.square().sum().backward()
            seen = torch.stack([function.seen for function in products(applied)])
            results.append((y.detach(), leaf.grad, seen))
            for function in products(applied):
                function.seen.fill_(-math.inf)
    for one, two in zip(results[:2], results[2:], strict=True):
        for a, b in zip(one, two, strict=True):
            assert torch.equal(a, b)  # type: ignore[arg-type]
