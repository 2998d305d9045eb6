"""Application to models: what changes, what must not, what is reported."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transform_toys.models import MODELS, VOCAB, bert, llama, logits, materialise, titan

from pipeline_lib.models.naming import canonical_titan
from pipeline_lib.transforms.apply import Applied, apply
from pipeline_lib.transforms.sites import find_sites
from pipeline_lib.transforms.state import load_transform_state, model_state, transform_state

STORE = {"type": "toy_store", "levels": 0}
FAULT = {"type": "toy_fault", "one_in": 0}
COMPUTE = {"type": "toy_compute", "gain": 1.0, "sites": {"kv:*": None, "*": {}}}
ATTENTION = {"type": "toy_compute", "gain": 1.0, "sites": {"kv:*": {}}}
IDENTITIES = {
    "store": [STORE],
    "fault": [FAULT],
    "compute": [COMPUTE],
    "attention": [ATTENTION],
    "all": [STORE, FAULT, COMPUTE],
}


def masks(tokens: Tensor, side: str) -> Tensor:
    """An attention mask that pads a few sequences on one side."""
    mask = torch.ones_like(tokens)
    mask[1, slice(0, 4) if side == "left" else slice(-4, None)] = 0
    mask[5, slice(0, 1) if side == "left" else slice(-1, None)] = 0
    return mask


@pytest.mark.parametrize("composition", IDENTITIES)
@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_identity_leaves_logits(family: str, composition: str, padding: str | None, tokens: Tensor) -> None:
    model = MODELS[family]()
    inputs = {} if padding is None else {"attention_mask": masks(tokens, padding)}
    kept = inputs.get("attention_mask", torch.ones_like(tokens)).bool()
    before = logits(model, tokens, **inputs)
    applied = apply(model, IDENTITIES[composition], seed=0)
    applied.context.begin(0, 0)
    after = logits(model, tokens, **inputs)
    assert (after - before)[kept].abs().max() <= 1e-5
    applied.remove()
    assert torch.equal(logits(model, tokens, **inputs), before)
    assert not transform_state(model)


@pytest.mark.parametrize("composition", IDENTITIES)
def test_identity_leaves_logits_of_torchtitan(composition: str, tokens: Tensor) -> None:
    before = logits(materialise(titan()), tokens)
    model = titan()
    names = list(model.state_dict())
    applied = apply(model, IDENTITIES[composition], seed=0, canonical=canonical_titan)
    assert [name for name in model.state_dict() if ".transform." not in name] == names
    materialise(model)
    applied.prepare()
    applied.context.begin(0, 0)
    assert (logits(model, tokens) - before).abs().max() <= 1e-5


def test_the_same_sites_whoever_built_the_model() -> None:
    hf = [at.site for at in find_sites(llama(intermediate_size=48))]
    tt = [at.site for at in find_sites(titan(), canonical_titan)]
    assert {site.name for site in hf} == {site.name for site in tt}
    assert {"model.layers.1.self_attn.query_key", "model.layers.0.self_attn.kv", "lm_head"} <= {s.name for s in hf}
    assert {s.name: s.shape for s in hf if s.kind == "embedding"} == {"model.embed_tokens": (VOCAB, 16)}


@pytest.mark.parametrize("family", MODELS)
def test_eager_attention_stays_eager(family: str, tokens: Tensor) -> None:
    model = MODELS[family]()
    model.set_attn_implementation("eager")
    mask = masks(tokens, "right")
    before = model(tokens, attention_mask=mask, output_attentions=True)
    applied = apply(model, [{**FAULT, "sites": {"*layer*.1.*kv": {}}}], seed=0)
    applied.context.begin(0, 0)
    after = model(tokens, attention_mask=mask, output_attentions=True)
    assert (after.logits - before.logits).abs().max() <= 1e-5
    kept = mask.bool()[:, None, :, None]
    for a, b in zip(after.attentions, before.attentions, strict=True):
        assert ((a - b) * kept).abs().max() <= 1e-5
    applied.remove()
    assert model.config._attn_implementation == "eager"


def test_attention_is_untouched_without_its_sites(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    only = {**FAULT, "sites": {"linear:*": {}, "embedding:*": {}}}
    apply(model, [only], seed=0)
    assert model.config._attn_implementation == "sdpa"
    assert type(model.model.layers[0].self_attn).__name__ == "LlamaAttention"
    model = titan()
    apply(model, [only], seed=0, canonical=canonical_titan)
    assert type(model.layers["0"].attention.inner_attention).__name__ == "ScaledDotProductAttentionWrapper"


def test_only_kv_keeps_the_fused_kernel(tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    fused = nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        nn.functional, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or fused(*a, **k)
    )
    for sites, number in (({"kv:*": {}}, 2), ({"*.0.*query_key": {}}, 1), ({"product:*": {}}, 0)):
        model = llama()
        apply(model, [{**FAULT, "sites": sites}], seed=0).context.begin(0, 0)
        calls.clear()
        logits(model, tokens)
        assert len(calls) == number, sites


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("kind", ["linear", "product", "embedding", "kv"])
@pytest.mark.parametrize(
    "entry",
    [{"type": "toy_store", "levels": 7}, {"type": "toy_fault"}, {"type": "toy_compute"}],
    ids=lambda e: e["type"],
)
def test_every_function_acts_at_every_kind_of_site(
    family: str, kind: str, entry: dict[str, Any], tokens: Tensor
) -> None:
    model = MODELS[family]()
    before = logits(model, tokens)
    # One table alone: a gain on all of BERT's is undone by its LayerNorm.
    names = "*" if kind != "embedding" else {"llama": "*embed_tokens", "bert": "*word_embeddings"}[family]
    applied = apply(model, [{**entry, "sites": {f"{kind}:{names}": {}}}], seed=0)
    applied.context.begin(0, 0)
    after = logits(model, tokens)
    assert after.isfinite().all()
    assert (after - before).abs().max() > 1e-4
    after.square().mean().backward()
    for name, parameter in model.named_parameters():
        if name.endswith("weight"):
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


def test_attention_dropout_only_in_training(tokens: Tensor) -> None:
    model = llama(attention_dropout=0.5)
    before = logits(model, tokens)
    apply(model, [{**FAULT, "sites": {"product:*": {}}}], seed=0).context.begin(0, 0)
    assert (logits(model, tokens) - before).abs().max() <= 1e-5
    model.train()
    assert (logits(model, tokens) - before).abs().max() > 1e-3


def test_masked_probabilities_are_never_multiplied(tokens: Tensor) -> None:
    model = llama()
    entry = {"type": "toy_fault", "one_in": 2, "sites": {"*attention_value": {}}}
    compute = {"type": "toy_compute", "gain": 3.0, "sites": {"*attention_value": {}}}
    apply(model, [entry, compute], seed=0).context.begin(0, 0)
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % VOCAB
    assert torch.equal(logits(model, tokens)[:, :-1], logits(model, changed)[:, :-1])


def test_report_is_plain_json_of_layer_to_setting() -> None:
    model = llama()
    entry = {"type": "toy_fault", "one_in": 4, "sites": {"lm_head": None, "*.0.mlp.*": {"one_in": 8}, "linear:*": {}}}
    report = apply(model, [entry, {**STORE, "sites": {"*kv": {}}}], seed=0).report
    assert json.loads(json.dumps(report)) == report
    assert report["settings"] == {
        "0:toy_fault:*.0.mlp.*": {"type": "toy_fault", "one_in": 8},
        "0:toy_fault:linear:*": {"type": "toy_fault", "one_in": 4},
        "1:toy_store:*kv": {"type": "toy_store", "levels": 0},
    }
    assert report["histogram"] == {
        "0:toy_fault:*.0.mlp.*": {"linear": 3},
        "0:toy_fault:linear:*": {"linear": 11},
        "1:toy_store:*kv": {"kv": 2},
    }
    assert report["layers"]["model.layers.0.mlp.up_proj"] == ["0:toy_fault:*.0.mlp.*"]
    assert report["layers"]["model.layers.1.mlp.up_proj"] == ["0:toy_fault:linear:*"]
    assert "lm_head" not in report["layers"]


def test_parameters_names_and_optimizer_stay(tokens: Tensor) -> None:
    model = llama()
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    applied = apply(model, [{"type": "toy_store"}, {"type": "toy_fault"}], seed=0)
    assert {n: id(p) for n, p in model.named_parameters()} == {n: id(p) for n, p in parameters.items()}
    applied.context.begin(0, 0)
    weight = model.lm_head.weight.detach().clone()
    logits(model, tokens).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.lm_head.weight, weight)
    assert isinstance(model.lm_head, nn.Linear)


def test_saved_model_reloads_plain(tmp_path: Path, tokens: Tensor) -> None:
    from transformers import LlamaForCausalLM

    model = llama()
    before = logits(model, tokens)
    apply(model, [STORE, FAULT, COMPUTE], seed=0)
    model.save_pretrained(tmp_path, state_dict=model_state(model))
    plain, info = LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(plain.lm_head) is nn.Linear
    assert plain.config._attn_implementation == "sdpa"
    assert torch.equal(logits(plain, tokens), before)


def make_stateful(family: str) -> tuple[nn.Module, Applied]:
    entry = {"type": "toy_compute", "gain": 3.0, "sites": {"kv:*": None, "*": {}}}
    if family == "torchtitan":
        model = titan()
        applied = apply(model, [entry], seed=0, canonical=canonical_titan)
        materialise(model)
        applied.prepare()
        return model, applied
    model = MODELS[family]()
    return model, apply(model, [entry], seed=0)


@pytest.mark.parametrize("family", [*MODELS, "torchtitan"])
def test_state_lives_under_transform_and_comes_back(family: str, tokens: Tensor) -> None:
    model, applied = make_stateful(family)
    state = transform_state(model)
    sites = len(applied.report["layers"])
    assert len(state) == 2 * sites
    assert all(torch.isfinite(tensor).all() for tensor in state.values())
    assert not set(state) & set(model_state(model))
    assert {**state, **model_state(model)}.keys() == model.state_dict().keys()
    weights = [name for name in model_state(model) if name.endswith("weight") and "norm" not in name.lower()]
    linear = next(name.removesuffix(".weight") for name in weights if "layer" in name)
    peak = state[f"{linear}.transform.compute.peak"]
    assert peak == model_state(model)[f"{linear}.weight"].abs().max()
    state = copy.deepcopy(state)
    other, other_applied = make_stateful(family)
    with torch.no_grad():
        for name, tensor in transform_state(other).items():
            tensor.fill_(7.0)
            assert state[name].max() != 7.0
    load_transform_state(other, state)
    applied.context.begin(0, 0)
    other_applied.context.begin(0, 0)
    assert torch.equal(logits(other, tokens), logits(model, tokens))


def test_state_names_agree_between_frameworks() -> None:
    hf, _ = make_stateful("llama")
    tt, _ = make_stateful("torchtitan")
    assert {canonical_titan(name) for name in transform_state(tt)} == set(transform_state(hf))


def test_a_transformed_model_can_be_copied(tokens: Tensor) -> None:
    model = bert()
    apply(model, [{"type": "toy_store", "levels": 5}], seed=0).context.begin(0, 0)
    assert torch.equal(logits(copy.deepcopy(model), tokens), logits(model, tokens))


def test_matrices_that_no_transform_reaches_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    """GPT-2 has layers of a kind of its own: a pattern on everything would leave all its blocks exact without a word."""
    from transformers import GPT2Config, GPT2LMHeadModel

    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=31, n_positions=8))
    entry = {"type": "bitflip", "weight": {"p": 0.01}, "sites": {"lm_head": {}}}
    report = apply(gpt2, [entry], seed=0).report
    assert {name.split(".")[-2] for name in report["out_of_reach"]} == {"c_attn", "c_proj", "c_fc"}
    assert "4 matrices are in no nn.Linear or nn.Embedding and stay exact" in capsys.readouterr().err
    model = llama(intermediate_size=48)
    assert "out_of_reach" not in apply(model, [{**entry, "sites": {"*": {}}}], seed=0).report
    assert "stay exact" not in capsys.readouterr().err
