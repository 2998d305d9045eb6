"""Settings of the recipes: budgets, refusals, what is not built yet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pipeline_lib.artifacts.job import Job
from pipeline_lib.config.errors import UserError
from pipeline_lib.config.registry import RECIPES
from pipeline_lib.training.hooks import Hooks, refuse_loop_hooks
from pipeline_lib.training.run import ENGINES, engine_of

OURS = ["cram", "distill", "finetune", "none", "relora"]
TRAINING = ["cram", "distill", "finetune", "relora"]


def test_all_recipes_are_registered() -> None:
    assert RECIPES.names() == sorted([*OURS, "pretrain"])
    for name in RECIPES.names():
        assert RECIPES.load(name).ENGINE in {*ENGINES, None}


@pytest.mark.parametrize("name", TRAINING)
def test_a_budget_becomes_steps(name: str) -> None:
    settings = RECIPES.load(name).Settings
    small: dict[str, Any] = {"global_batch": 8, "seq_len": 10}
    by_steps = settings(steps=13, warmup_steps=2, **small).resolved(None)
    by_tokens = settings(tokens=1001, warmup_fraction=0.2, **small).resolved(None)
    by_share = settings(tokens_per_parameter=0.5, warmup_steps=2, **small).resolved(2002)
    assert by_steps == by_tokens == by_share, "the same training, however it is asked for"
    assert by_steps.steps == 13
    assert by_steps.resolved(None) == by_steps
    assert by_steps.semantic()["type"] == name


@pytest.mark.parametrize("name", TRAINING)
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 3, "tokens": 5}, r"given 2 times \(steps, tokens\)"),
        ({"steps": 3, "warmup_steps": 3}, "warmup_steps 3 must be less than steps 3"),
        ({"steps": 3, "warmup_steps": 1, "warmup_fraction": 0.1}, "both given"),
        ({"steps": 3, "global_batch": 6, "fault_devices": 4}, "fault_devices 4 must divide global_batch 6"),
        ({"steps": 0}, "greater than 0"),
        ({"steps": 3, "lr": 0.0}, "greater than 0"),
        ({"steps": 3, "betas": [0.9, 1.0]}, "less than 1"),
        ({"steps": 3, "learning_rate": 1.0}, "Extra inputs"),
    ],
)
def test_impossible_settings_are_refused(name: str, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RECIPES.load(name).Settings(**wrong)


@pytest.mark.parametrize("name", ["cram", "distill", "relora"])
def test_a_recipe_without_a_budget_of_its_own_wants_one(name: str) -> None:
    with pytest.raises(ValidationError, match="there is no budget"):
        RECIPES.load(name).Settings()


def test_a_share_of_unknown_parameters_is_refused() -> None:
    settings = RECIPES.load("finetune").Settings(tokens_per_parameter=0.01)
    with pytest.raises(ValueError, match="needs the model's number of parameters"):
        settings.resolved(None)


def test_what_is_not_built_is_said_when_planning() -> None:
    with pytest.raises(ValidationError, match=r"unknown method\n.*stacking"):
        RECIPES.load("cram").Settings(steps=1, methods=["stacking"])
    assert [name for name in RECIPES.names() if getattr(RECIPES.load(name), "NOT_BUILT", "")] == []


def test_refusals_have_reasons() -> None:
    refused = {name: RECIPES.load(name).refuses("bert", []) for name in OURS}
    assert refused["none"] is None
    assert refused["cram"] is None
    assert refused["relora"] is None
    for name in ("finetune", "distill"):
        assert "bert" in refused[name] or "decoder" in refused[name]
    assert [name for name in RECIPES.names() if RECIPES.load(name).refuses("llama", ["bitflip"])] == []


def test_a_job_that_cannot_be_trained_is_refused_before_it_starts(tmp_path: Path) -> None:
    job = Job("train", "x", "f", {"recipe": {"type": "none"}}, {}, tmp_path, tmp_path)
    with pytest.raises(UserError, match="it trains nothing"):
        engine_of(job)


def test_fine_tuning_needs_weights(tmp_path: Path) -> None:
    module = RECIPES.load("finetune")
    job = Job("train", "x", "f", {"seed": 0}, {}, tmp_path, tmp_path)
    with pytest.raises(UserError, match="needs weights to start from"):
        module.hooks(module.Settings(steps=1), job)


def test_the_trainer_refuses_hooks_it_would_not_call() -> None:
    class Selective(Hooks):
        def select(self, loop: Any, step: int, batches: Any) -> Any:
            return batches[:1]

    settings = RECIPES.load("finetune").Settings(steps=1)
    refuse_loop_hooks(Hooks(settings, 0), "fine")
    with pytest.raises(UserError, match=r"changes what the Trainer decides itself\n.*select"):
        refuse_loop_hooks(Selective(settings, 0), "selective")
