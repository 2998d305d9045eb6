"""Weight clipping, on every engine: in range before the first and after every step, where the patterns say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import nn

from pipeline_lib.artifacts.files import read_json
from pipeline_lib.config.errors import UserError
from pipeline_lib.config.registry import RECIPES
from pipeline_lib.training.clipping import WeightClipping
from tests.training_bench import Bench, Case, Sabotage, weights

LIMIT = 2**-6
CASES = [Case("pretrain", "llama"), Case("finetune", "llama"), Case("cram", "llama")]


@pytest.fixture(scope="module", params=CASES, ids=str)
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(request.param, tmp_path_factory.mktemp("clipped"))


def trained(bench: Bench, name: str, world: int = 1, **recipe: Any) -> Path:
    work = bench.fresh(name, recipe=recipe)
    assert bench.run(work, world=world) == [0] * world
    return work


def largest(work: Path) -> dict[str, float]:
    state = load_file(work / "out" / "model.safetensors")
    return {name: float(value.abs().max()) for name, value in state.items()}


def in_layers(name: str) -> bool:
    return "_proj" in name


def test_every_engine_clips_the_linear_layers_and_nothing_else(bench: Bench) -> None:
    clipped, free = largest(trained(bench, "clipped", clip_weights=LIMIT)), largest(bench.reference)
    for name, value in clipped.items():
        if in_layers(name):
            assert value <= LIMIT < free[name], name
        else:
            assert value > LIMIT, name
    assert any(value == pytest.approx(LIMIT) for name, value in clipped.items() if in_layers(name)), "it is the bound"


def test_clipped_training_resumes_and_shards(bench: Bench) -> None:
    whole = trained(bench, "whole", clip_weights=LIMIT)
    work = bench.fresh("killed", recipe={"clip_weights": LIMIT})
    assert bench.run(work, Sabotage("kill", "log", 4)) == [-9]
    assert bench.run(work) == [0]
    bench.same_result(work, whole)
    two = trained(bench, "two", world=2, clip_weights=LIMIT)
    assert max(value for name, value in largest(two).items() if in_layers(name)) <= LIMIT
    ones, twos = (load_file(path / "out" / "model.safetensors") for path in (whole, two))
    assert max(float((ones[name] - twos[name]).abs().max()) for name in ones) < 1e-4


def test_patterns_choose_layers_the_first_match_wins(bench: Bench) -> None:
    limits = {"*.layers.0.*": None, "linear:*.layer*.*": LIMIT, "lm_head": 0.5, "*embed_tokens": 0.125}
    found = largest(trained(bench, "patterns", clip_weights=limits))
    assert found["model.layers.0.mlp.up_proj.weight"] > LIMIT >= found["model.layers.1.mlp.up_proj.weight"]
    assert found["model.embed_tokens.weight"] <= 0.125
    assert found["lm_head.weight"] <= 0.5
    assert weights(bench.root / "patterns") != weights(bench.reference)


def test_a_pattern_that_decides_nothing_is_refused(bench: Bench) -> None:
    work = bench.fresh("nothing", recipe={"clip_weights": {"*.no_such": 0.1}})
    assert bench.run(work) == [2]
    message = read_json(work / "failure.json")["message"]
    assert "decides about no weight" in message
    assert "*.no_such" in message
    assert "model.layers.0.self_attn.q_proj" in message


def test_clipping_is_a_projection() -> None:
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    clip = WeightClipping(model, (("a", 0.1),))
    clip()
    once = {name: value.clone() for name, value in model.state_dict().items()}
    clip()
    for name, value in model.state_dict().items():
        expected = before[name].clamp(-0.1, 0.1) if name == "a.weight" else before[name]
        assert torch.equal(once[name], expected)
        assert torch.equal(value, once[name])


def test_no_limit_clips_nothing() -> None:
    assert WeightClipping(nn.Linear(2, 2), None).weights == []


def test_a_limit_that_hides_another_is_refused() -> None:
    with pytest.raises(UserError, match="the first match wins"):
        WeightClipping(nn.ModuleDict({"a": nn.Linear(2, 2)}), (("*", 0.1), ("a", 0.2)))


@pytest.mark.parametrize("recipe", ["pretrain", "finetune", "cram"])
def test_settings(recipe: str) -> None:
    settings = RECIPES.load(recipe).Settings
    plain, given = settings(steps=3), settings(steps=3, clip_weights=0.1)
    assert "clip_weights" not in plain.semantic(), "trainings from before the setting keep their fingerprint"
    assert given.semantic()["clip_weights"] == [["linear:*.layer*.*", 0.1]]
    assert settings(**given.semantic()) == given
    ordered = settings(steps=3, clip_weights={"b": 1.0, "a": None})
    assert settings(**ordered.semantic()).clip_weights == (("b", 1.0), ("a", None))
    for wrong in (0, -1.0, {}, {"a": 0}, "much"):
        with pytest.raises(ValidationError):
            settings(steps=3, clip_weights=wrong)
