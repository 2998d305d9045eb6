"""Settings of `pretrain`."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from pipeline_lib.training.recipes.pretrain import Settings, refuses

PARAMETERS_60M = 63_226_752


def test_published_steps_of_the_60m_model() -> None:
    """48 sequences on each of 2 devices: both count."""
    resolved = Settings(global_batch=96, seq_len=2048).resolved(PARAMETERS_60M)
    assert (resolved.steps, resolved.warmup_steps) == (7075, 1415)


@pytest.mark.parametrize(
    ("budget", "steps"),
    [({"steps": 7}, 7), ({"tokens": 1025}, 3), ({"tokens": 1024}, 2), ({"tokens_per_parameter": 0.5}, 2)],
)
def test_budgets(budget: dict, steps: int) -> None:
    resolved = Settings(global_batch=8, seq_len=64, **budget).resolved(2000)
    assert resolved.steps == steps
    assert resolved.tokens is resolved.tokens_per_parameter is resolved.warmup_fraction is None


def test_resolved_settings_survive_json_and_are_equal_for_equal_trainings() -> None:
    by_tokens = Settings(tokens=5120, global_batch=8, seq_len=64).resolved()
    by_steps = Settings(steps=10, warmup_steps=2, global_batch=8, seq_len=64).resolved()
    assert by_tokens == by_steps
    assert Settings(**json.loads(json.dumps(by_tokens.semantic()))).resolved() == by_tokens


def test_the_number_of_parameters_is_asked_for() -> None:
    with pytest.raises(ValueError, match="number of parameters"):
        Settings().resolved()


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 3, "tokens": 5},
        {"tokens_per_parameter": 22.0, "steps": 3},
        {"steps": 0},
        {"steps": 5, "warmup_steps": 5},
        {"warmup_steps": 1, "warmup_fraction": 0.1},
        {"warmup_fraction": 1.0},
        {"fault_devices": 5},
        {"seq_len": 33},
        {"lr": 0},
        {"betas": [0.9, 1.0]},
        {"precision": "fp8"},
        {"max_norm": 0},
        {"learning_rate": 1e-3},
    ],
    ids=str,
)
def test_wrong_settings(wrong: dict) -> None:
    with pytest.raises(ValidationError):
        Settings(**wrong)


def test_refusals() -> None:
    assert refuses("llama", ["bitflip"]) is None
    assert "not mistral" in (refuses("mistral", []) or "")
    assert "cram" in (refuses("bert", []) or "")
