"""The study over training seeds is of today's configuration, adds up, and one cell of it comes out again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline_lib.config.load import read_yaml
from pipeline_lib.config.plan import Plan
from pipeline_lib.evaluation.statistics import summarise
from studies.report import ROOT, at_seed, load
from studies.robustness import rerun, seeded


@pytest.fixture(scope="module")
def study() -> dict[str, Any]:
    return load("robustness")


def test_cells_are_means_over_at_least_three_training_seeds(study: dict[str, Any]) -> None:
    assert len(set(study["seeds"])) == len(study["seeds"]) >= 3
    for cell in (cell for row in study["cells"] for cell in row):
        assert len(cell["seeds"]) == len(study["seeds"])
        over = summarise([run["mean"] for run in cell["seeds"]])
        assert {key: cell[key] for key in ("mean", "stderr", "n")} == {
            key: over[key] for key in ("mean", "stderr", "n")
        }
        for run in cell["seeds"]:
            again = summarise(run["values"])
            assert (run["mean"], run["stderr"], run["n"]) == (again["mean"], again["stderr"], again["n"])


def test_settings_are_those_of_config_yaml(study: dict[str, Any], tmp_path: Path) -> None:
    """Whoever changes the demo's model, recipe, flips or task runs the study again."""
    config = read_yaml(ROOT / "config.yaml")
    table, settings = config["tables"]["robustness"], study["settings"]
    assert {key: settings[key] for key in ("task", "metric", "rows", "columns")} == {
        key: table[key] for key in ("task", "metric", "rows", "columns")
    }
    cells = [[cell["experiment"] for cell in row] for row in study["cells"]]
    assert cells == table["cells"]
    expected = {"task": config["tasks"][table["task"]], "fault_seeds": config["fault_seeds"]}
    assert settings["evaluation"] == expected
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(seeded(config, study["seeds"])))
    resolver = Plan.load(str(tmp_path / "config.yaml")).resolver
    for name, used in ((cells[-1][-1], settings["training"]), (cells[0][0], {**settings["training"], "transform": []})):
        for seed in study["seeds"]:
            training = resolver.train(resolver.experiments.get(at_seed(name, seed))).settings
            assert training == {**used, "seed": seed}


@pytest.mark.slow
def test_a_cell_comes_out_again(study: dict[str, Any], tmp_path: Path) -> None:
    """Bit for bit where processor and versions are those of the study, else within the tolerance it states."""
    expected, found = study["rerun"], rerun(tmp_path)
    assert found["metrics"].keys() == expected["metrics"].keys()
    if found["made_with"] == expected["made_with"]:
        assert found == expected
    for name, figures in expected["metrics"].items():
        assert found["metrics"][name]["mean"] == pytest.approx(figures["mean"], rel=expected["tolerance"]), name
