"""The study of defences is of today's configuration, adds up, and one row of it comes out again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline_lib.config.load import read_yaml
from pipeline_lib.config.plan import Plan
from pipeline_lib.evaluation.statistics import summarise
from studies.defences import (
    ARMS,
    EXPERIMENTS,
    FAULT_SEEDS,
    FLIPS,
    METRIC,
    ROWS,
    TASK,
    interval,
    rerun,
    seeded,
    trainings,
)
from studies.report import ROOT, load


@pytest.fixture(scope="module")
def study() -> dict[str, Any]:
    return load("defences")


def test_cells_are_means_over_at_least_three_training_seeds(study: dict[str, Any]) -> None:
    assert len(set(study["seeds"])) == len(study["seeds"]) >= 3
    assert set(study["rows"]) == set(ROWS)
    for arms in study["rows"].values():
        assert set(arms) == set(ARMS)
        for arm, cell in arms.items():
            over = summarise([run["mean"] for run in cell["seeds"]])
            assert {key: cell[key] for key in ("mean", "stderr", "n")} == {
                key: over[key] for key in ("mean", "stderr", "n")
            }
            for run in cell["seeds"]:
                assert run["n"] == (1 if arm == "clean" else FAULT_SEEDS)
                assert run["mean"] == summarise(run["values"])["mean"]


def test_every_row_is_evaluated_under_the_same_flips() -> None:
    assert {yaml.safe_dump(EXPERIMENTS[name]["transform"]) for name in ROWS.values()} == {yaml.safe_dump(FLIPS)}


def test_settings_are_those_of_today(study: dict[str, Any], tmp_path: Path) -> None:
    """Whoever changes the nano model, its recipe, the task or a default runs the study again."""
    config, settings = read_yaml(ROOT / "config.yaml"), study["settings"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(seeded(config, study["seeds"]), sort_keys=False))
    plan = Plan.load(str(tmp_path / "config.yaml"))
    for seed in study["seeds"]:
        assert trainings(plan, seed) == settings["training"]
    expected = {"task": config["tasks"][TASK], "transform": FLIPS, "fault_seeds": FAULT_SEEDS}
    assert (settings["evaluation"], settings["metric"]) == (expected, METRIC)


def test_the_interval_is_students() -> None:
    """Three values 1, 2, 3: mean 2, standard error 1/√3, t = 4.3027 (two degrees of freedom, 97.5 %)."""
    mean, half = interval([1.0, 2.0, 3.0])
    assert (mean, half) == (2.0, pytest.approx(4.302653 / 3**0.5))


@pytest.mark.slow
def test_a_row_comes_out_again(study: dict[str, Any], tmp_path: Path) -> None:
    """Bit for bit where processor and versions are those of the study, else within the tolerance it states."""
    expected, found = study["rerun"], rerun(tmp_path)
    assert found["metrics"].keys() == expected["metrics"].keys()
    if found["made_with"] == expected["made_with"]:
        assert found == expected
    for name, figures in expected["metrics"].items():
        assert found["metrics"][name]["mean"] == pytest.approx(figures["mean"], rel=expected["tolerance"]), name
