"""The planted methods are found, the study has what it must have, and its small edition comes out again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline_lib.config.registry import METHODS
from studies.efficient_training import ARMS, HOURS, MEASURES, PLANTED, TASKS, rerun
from studies.efficient_training_page import compared, verdict_of
from studies.report import load
from tests.training.cram_bench import Bench, Stop, losses

LOSS = MEASURES[0]["task"]


@pytest.fixture(scope="module")
def study() -> dict[str, Any]:
    return load("efficient_training")


def test_it_has_methods_budgets_and_seeds(study: dict[str, Any]) -> None:
    settings = study["settings"]
    assert len(set(settings["arms"]) - set(PLANTED) - {"baseline"}) >= 6
    assert len(settings["columns"]) >= 2
    assert len(set(settings["seeds"])) >= 3
    assert (settings["arms"], settings["columns"], settings["measures"]) == (list(ARMS), list(HOURS), MEASURES)
    assert settings["tasks"] == TASKS


def test_the_planted_methods_come_out_as_they_must(study: dict[str, Any]) -> None:
    made = compared(study)
    for arm in PLANTED:
        for column, word in verdict_of(made, arm, LOSS).items():
            assert word == arm.rpartition("-")[2], (arm, column)


def test_the_slight_ones_are_of_the_size_of_delta(study: dict[str, Any]) -> None:
    """About the smallest difference that matters, so their verdicts are no matter of course."""
    delta = MEASURES[0]["delta"]
    for cell in compared(study).cells:
        if cell.arm.startswith("planted-slightly") and cell.task == LOSS and cell.against:
            assert 0.9 * delta <= abs(cell.against.difference) < 1.6 * delta, (cell.arm, cell.column)


def test_every_arm_was_charged_the_same_budget(study: dict[str, Any]) -> None:
    """Up to the last step, which ends the budget."""
    for c, column in enumerate(study["settings"]["columns"]):
        hours = study["settings"]["hours"][column]
        for a, arm in enumerate(study["settings"]["arms"]):
            work = study["work"][f"{c}.{a}"]
            step = work["rst_hours"] / work["steps"]
            assert hours <= work["rst_hours"] <= hours + 4 * step, arm


def test_the_small_edition_comes_out_again(study: dict[str, Any], tmp_path: Path) -> None:
    """Bit for bit where processor and versions are those of the study, else within the tolerance it states."""
    expected, found = study["rerun"], rerun(tmp_path)
    assert found["values"].keys() == expected["values"].keys()
    assert found["work"].keys() == expected["work"].keys()
    if found["made_with"] == expected["made_with"]:
        assert found["values"] == expected["values"]
    for key, values in expected["values"].items():
        assert found["values"][key] == pytest.approx(values, rel=expected["tolerance"])
    for key, work in expected["work"].items():
        assert found["work"][key]["steps"] == work["steps"]
    better, worse = (found["values"][f"0.{a}.0"] for a in (1, 2))
    assert max(better) < min(found["values"]["0.0.0"]) and max(found["values"]["0.0.0"]) < min(worse)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


@pytest.mark.parametrize("word", ["better", "worse"])
def test_the_slight_ones_train_as_the_baseline_and_then_move_its_loss(
    bench: Bench, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, shift = f"planted-slightly-{word}", 0.005  # random text, on which nothing can be learnt, knows no larger one
    monkeypatch.setattr("studies.planted.walk.SHIFT", shift)
    monkeypatch.setitem(METHODS._extra, name, PLANTED[name])
    plain = bench.loop("plain", steps=6)
    plain.train(Stop(None))
    moved = bench.loop("moved", steps=6, methods=[name])
    moved.train(Stop(None))
    assert losses(bench.root / "moved" / "out") == losses(bench.root / "plain" / "out")
    by = moved.hooks.valid_loss(6) - plain.hooks.valid_loss(6)
    assert by == pytest.approx(-shift if word == "better" else shift, abs=1e-4)
