"""Optimizers as methods: adamw is the recipe's own, lion and sophia-g are wired as said, curvature is what it is called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from pipeline_lib.artifacts.files import read_json
from pipeline_lib.config.registry import RECIPES
from pipeline_lib.training.curvature import sampled, uniforms
from pipeline_lib.training.losses import IGNORED
from pipeline_lib.training.optimizers import Lion, SophiaG
from tests import training_bench
from tests.training.cram_bench import Bench
from tests.training_bench import BATCH, SEQ_LEN, STEPS, Case, metrics


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("sophia"))


def loop(
    bench: Bench, name: str, *methods: Any, shape: str = "crammed", micro_batch: int = BATCH, **recipe: Any
) -> Any:
    """A loop in this process, before its first step."""
    given = {"steps": STEPS, "warmup_steps": 2, "methods": list(methods), **recipe}
    return bench.loop(name, shape, execution={"micro_batch": micro_batch}, **given)


def sophia(**settings: Any) -> dict[str, Any]:
    return {"sophia-g": {"hessian_sequences": BATCH, **settings}}


def hessians(made: Any) -> dict[str, torch.Tensor]:
    names = {id(parameter): name for name, parameter in made.model.named_parameters()}
    state = made.optimizer.state
    return {names[id(parameter)]: state[parameter]["hessian"] for parameter in state}


def test_sampling_follows_the_distribution() -> None:
    logits_V = torch.tensor([0.0, 1.0, -2.0, 2.0, -30.0])
    uniform_N = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    found_N = sampled(logits_V.expand(20_000, 5), uniform_N)
    share_V = torch.bincount(found_N, minlength=5) / 20_000
    p_V = torch.softmax(logits_V, 0)
    assert ((share_V - p_V).abs() <= 4 * (p_V * (1 - p_V) / 20_000).sqrt() + 1e-9).all()
    assert torch.equal(sampled(logits_V.expand(1, 5), torch.tensor([1 - 2**-24])), torch.tensor([3]))
    assert torch.equal(uniforms(1, 2, 9)[:5], uniforms(1, 2, 5))
    assert not torch.equal(uniforms(1, 2, 5), uniforms(1, 3, 5))


def test_bartletts_identity() -> None:
    """B·ĝ² averages to the Gauss-Newton diagonal of a softmax regression, which is known in closed form."""
    generator = torch.Generator().manual_seed(0)
    x_BD, weight_VD = torch.randn(3, 2, generator=generator), torch.randn(4, 2, generator=generator)
    p_BV = torch.softmax(x_BD @ weight_VD.T, -1)
    exact_VD = torch.einsum("bv,bd->vd", p_BV * (1 - p_BV), x_BD.square()) / 3
    draws = 4000
    found = torch.zeros(draws, 4, 2)
    for number in range(draws):
        labels_B = sampled(x_BD @ weight_VD.T, torch.rand(3, generator=generator))
        gradient_VD = torch.einsum("bv,bd->vd", p_BV - F.one_hot(labels_B, 4), x_BD) / 3
        found[number] = 3 * gradient_VD.square()
    error_VD = found.std(0) / draws**0.5
    assert ((found.mean(0) - exact_VD).abs() < 4.5 * error_VD).all()


@pytest.mark.parametrize("shape", ["crammed", "bert", "llama"])
def test_the_estimate_by_hand(bench: Bench, shape: str) -> None:
    """ĝ is the gradient of the mean cross entropy of sampled labels at the targets, over all sequences."""
    made = loop(bench, f"by-hand-{shape}", sophia(), shape=shape, micro_batch=2)
    text = made.hooks._text(0, BATCH)
    at_BT = text["labels"] != IGNORED
    assert at_BT.all() == (shape == "llama"), "a decoder's targets are everywhere"
    logits_NV = made.model(input_ids=text["input_ids"]).logits[at_BT]
    uniform_N = torch.stack([uniforms(made.hooks.seed, place, SEQ_LEN) for place in range(BATCH)])[at_BT]
    F.cross_entropy(logits_NV, sampled(logits_NV, uniform_N)).backward()
    expected = {name: 0.01 * p.grad.square() for name, p in made.model.named_parameters() if p.grad is not None}
    made.hooks.methods[0].before_step(0)
    found = hessians(made)
    assert sorted(found) == sorted(expected) == sorted(name for name, _ in made.model.named_parameters())
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-4, atol=1e-12), name
        assert found[name].count_nonzero() > 0, name
    assert all(parameter.grad is None for parameter in made.model.parameters())
    assert made.hooks.place == BATCH, "fresh text: nobody else reads it"


def test_as_published_the_head_has_no_curvature(bench: Bench) -> None:
    """The defect that may have shaped the published numbers, by name only: hidden states taken for logits."""
    made = loop(bench, "published", sophia(hessian="published"))
    made.hooks.methods[0].before_step(0)
    found = hessians(made)
    head = {name for name, _ in made.model.named_parameters() if not name.startswith("bert.")}
    assert head
    assert not head & set(found), "parameters of the head get none"
    body = made.model.base_model
    text = made.hooks._text(0, BATCH)
    made.model.zero_grad()
    hidden_ND = body(input_ids=text["input_ids"]).last_hidden_state.flatten(0, 1)
    uniform_N = torch.stack([uniforms(3, place, SEQ_LEN) for place in range(BATCH)]).flatten()
    F.cross_entropy(hidden_ND, sampled(hidden_ND, uniform_N)).backward()  # all positions, all dimensions
    for name, parameter in made.model.named_parameters():
        if name in found:
            assert parameter.grad is not None
            assert torch.allclose(found[name], 0.01 * parameter.grad.square(), rtol=1e-4, atol=1e-12), name


def test_as_published_only_the_last_sequences_count(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline_lib.training.curvature.PUBLISHED_SEQUENCES", 2)
    made = loop(bench, "last", sophia(hessian="published"))
    other = loop(bench, "alone", sophia(hessian="published", hessian_sequences=2))
    text = made.hooks._text(0, BATCH)
    curvature, alone = made.hooks.methods[0].curvature, other.hooks.methods[0].curvature
    assert curvature.estimate(text, 0)
    assert alone.estimate({name: tensor[-2:] for name, tensor in text.items()}, 0)
    for name, value in hessians(made).items():
        assert torch.equal(value, hessians(other)[name]), name
    made.hooks.methods[0].before_step(0)
    assert made.hooks.work.charged["hessian", 4] == BATCH, "those that were forgotten were paid for"


def test_estimates_are_charged_or_free(bench: Bench) -> None:
    for free in (False, True):
        made = loop(bench, f"free-{free}", sophia(hessian_every=2, free_updates=free))
        hooks = made.hooks
        for _ in range(3):
            made._optimizer_step()
        charged, gratis = (hooks.work.charged, hooks.work.free)[:: -1 if free else 1]
        assert charged["hessian", 4] == 2 * BATCH, "before steps 0 and 2"
        assert not any(kind == "hessian" for kind, _ in gratis)
        assert hooks.work.charged["train", 4] == 3 * BATCH
        assert hooks.methods[0].result() == {"hessian": "logits", "estimates": 2, "left_out": 0}
        assert hooks.place == 5 * BATCH


def test_an_estimate_that_overflows_is_left_out(bench: Bench) -> None:
    """fp16 scales the sampled loss as it does the training's; the published code did not, and was unstable in fp16."""
    made, exact = loop(bench, "fp16", sophia(), precision="fp16"), loop(bench, "fp32", sophia())
    for each in (made, exact):
        each.hooks.methods[0].before_step(0)
    found, expected = hessians(made), hessians(exact)
    total = sum(float(value.sum()) for value in expected.values())
    assert sum(float(value.sum()) for value in found.values()) == pytest.approx(total, rel=0.05)
    made.scale.value = 2.0**40
    before = {name: value.clone() for name, value in found.items()}
    made.hooks.methods[0].before_step(10)
    assert made.hooks.methods[0].result()["left_out"] == 1
    assert all(torch.equal(value, before[name]) for name, value in hessians(made).items())


def test_settings_reach_the_optimizers(bench: Bench) -> None:
    made = loop(bench, "lion", {"lion": {"lr": 2e-3, "weight_decay": 0.3}}, lr=1e-2)
    assert isinstance(made.optimizer, Lion)
    assert [group["weight_decay"] for group in made.optimizer.param_groups] == [0.3, 0.0]
    matrices, vectors = (group["params"] for group in made.optimizer.param_groups)
    assert {p.ndim for p in matrices} == {2}
    assert {p.ndim for p in vectors} == {1}
    rate, _ = made._optimizer_step()
    assert rate == pytest.approx(2e-3 / 3), "its own peak, in the first of the recipe's two steps of warm-up"
    made = loop(bench, "sophia", sophia(rho=0.1), decay_norms=True)
    assert isinstance(made.optimizer, SophiaG)
    assert made.optimizer.param_groups[0]["batch"] == BATCH * SEQ_LEN
    assert made.optimizer.param_groups[0]["rho"] == 0.1
    names = {id(parameter): name for name, parameter in made.model.named_parameters()}
    exempt = {names[id(p)] for p in made.optimizer.param_groups[1]["params"]}
    assert exempt, "as published"
    assert all("bias" in name for name in exempt)
    assert loop(bench, "b", sophia(batch_tokens=196_608)).optimizer.param_groups[0]["batch"] == 196_608


def test_defaults_are_those_of_the_paper() -> None:
    settings = RECIPES.load("cram").Settings(steps=1, methods=["lion"]).methods[0].semantic()
    assert settings == {"type": "lion", "lr": 1e-4, "betas": [0.9, 0.99], "weight_decay": 0.1} or settings == {
        "type": "lion", "lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.1,
    }  # fmt: skip
    settings = RECIPES.load("cram").Settings(steps=1, methods=["sophia-g"]).methods[0].semantic()
    expected = {"lr": 1e-3, "rho": 0.04, "weight_decay": 0.01, "hessian_every": 10, "hessian_sequences": 768}
    assert expected.items() <= settings.items()
    assert list(settings["betas"]) == [0.965, 0.99]
    assert (settings["hessian"], settings["free_updates"]) == ("logits", False)
    assert RECIPES.load("cram").Settings(steps=1).tokens_per_step == 196_608, "B at the published batch"
    with pytest.raises(ValueError, match="lion and sophia-g each bring an optimizer"):
        RECIPES.load("cram").Settings(steps=1, methods=["lion", "sophia-g"])


def test_adamw_is_the_recipes_own_optimizer(bench: Bench) -> None:
    plain, named = loop(bench, "no-method"), loop(bench, "adamw", "adamw")
    for made in (plain, named):
        for _ in range(3):
            made._optimizer_step()
    for (name, one), other in zip(plain.model.named_parameters(), named.model.parameters(), strict=True):
        assert torch.equal(one, other), name
    other = loop(bench, "own", {"adamw": {"lr": 5e-3, "betas": [0.5, 0.6], "weight_decay": 0.2}})
    assert [group["weight_decay"] for group in other.optimizer.param_groups] == [0.2, 0.0]
    assert other.optimizer.param_groups[0]["betas"] == (0.5, 0.6)
    assert other._optimizer_step()[0] == pytest.approx(5e-3 / 3)


@pytest.mark.slow
def test_ranks_share_an_estimate(tmp_path: Path) -> None:
    """Two ranks estimate what one does, but for the order of sums; what they cannot share is refused."""
    ranks = training_bench.Bench(Case("cram", "bert"), tmp_path)
    given = {"methods": [sophia(hessian_every=3, hessian="published")]}  # the head's shards get no gradient
    alone, both = (ranks.fresh(f"ranks-{n}", transform=[], recipe=given) for n in (1, 2))
    assert ranks.run(alone) == [0]
    assert ranks.run(both, world=2) == [0, 0]
    for one, other in zip(metrics(alone), metrics(both), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=2e-4)
    odd = ranks.fresh("odd", transform=[], recipe={"methods": [sophia(hessian_sequences=3)]})
    assert ranks.run(odd, world=2) == [2, 2]
    assert "not a multiple of the ranks" in read_json(odd / "failure.json")["message"]
