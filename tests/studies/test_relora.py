"""The study is a controlled pair, its statement of memory holds, and two of its cells come out again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from studies.relora import ARMS, RATES, VALIDATION, cell, config, recipe, train_cells
from studies.relora_page import best_rate, final
from studies.report import load

SHARED = ("steps", "lr", "warmup_fraction", "min_lr_factor", "global_batch", "seq_len", "betas", "weight_decay", "eps")


@pytest.fixture(scope="module")
def study() -> dict[str, Any]:
    return load("relora")


def test_every_arm_has_every_rate_and_at_least_three_seeds(study: dict[str, Any]) -> None:
    rates, seeds = study["settings"]["rates"], study["seeds"]
    assert len(set(seeds)) == len(seeds) >= 3
    assert set(study["cells"]) == {cell(arm, rate, seed) for arm in ARMS for rate in rates for seed in seeds}
    assert (tuple(rates), VALIDATION) == (RATES, 64)


def test_arms_differ_in_what_they_are_and_in_nothing_else(study: dict[str, Any]) -> None:
    steps = study["settings"]["steps"]
    assert study["settings"]["arms"] == ARMS
    [plain] = recipe("plain", steps, RATES[0]).values()
    for arm in ARMS:
        [own] = recipe(arm, steps, RATES[0]).values()
        assert {key: own[key] for key in SHARED} == {key: plain[key] for key in SHARED}


def test_the_best_rate_has_the_lowest_mean(study: dict[str, Any]) -> None:
    for arm in ARMS:
        means = {rate: sum(final(study, arm, rate)) for rate in study["settings"]["rates"]}
        assert means[best_rate(study, arm)] == min(means.values())


def test_the_stated_memory_of_the_large_shape_is_within_a_tenth(study: dict[str, Any]) -> None:
    large = study["large"]
    assert large["settings"]["shape"] | {"layers": 5} == large["settings"]["shape"] | {
        "dim": 4160,
        "ffn": 14400,
        "layers": 5,
    }
    for arm, found in large["arms"].items():
        for size in (found, found["second"]):
            assert size["stated"] == pytest.approx(size["measured"], rel=0.1), arm
        parts = {key: value for key, value in found["all_layers"].items() if key != "host"}
        assert found["all_layers_total"] == sum(parts.values())


@pytest.mark.slow
def test_two_cells_come_out_again(tmp_path: Path) -> None:
    """A small edition of them, twice: the same numbers."""
    runs = []
    for name in ("one", "two"):
        whole = config([0], 8, [8e-3])
        chosen = {
            key: whole["experiments"][key] for key in (cell("plain", 8e-3, 0), cell("ReLoRA on ternary", 8e-3, 0))
        }
        folder = tmp_path / name
        folder.mkdir()
        runs.append(train_cells(folder, {**whole, "experiments": chosen}, 8))
    assert runs[0] == runs[1]
    for found in runs[0].values():
        assert found["points"][-1]["valid"] < found["points"][0]["valid"]
