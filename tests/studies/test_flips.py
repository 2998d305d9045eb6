"""The study of flip kinds is of today's configuration, and the page on bit flips shows its figures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from studies.flips import RERUN_ERRORS, rerun, settings, summary, table
from studies.report import ROOT, load


@pytest.fixture(scope="module")
def study() -> dict[str, Any]:
    return load("flips")


def test_settings_are_those_of_config_yaml(study: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever changes the model, the recipe, the task or the sweep runs it again."""
    monkeypatch.chdir(ROOT)
    assert study["settings"] == settings()


def test_every_point_of_the_grid_is_there(study: dict[str, Any]) -> None:
    sweep, grid = table(study), study["settings"]["sweep"]["grid"]
    assert set(sweep.axes) == set(grid)
    size = 1
    for values in grid.values():
        size *= len(values)
    assert len({repr(values) for values, _ in sweep.points}) == len(sweep.points) == size
    clean = [figures["byte_perplexity"] for values, figures in sweep.points if values[:2] == [0, 0]]
    assert len({measured.mean for measured in clean}) == 1, "without flips, where they are not makes no difference"
    assert all(measured.n == 1 for measured in clean)
    others = [figures["byte_perplexity"] for values, figures in sweep.points if values[:2] != [0, 0]]
    assert all(measured.n == study["settings"]["fault_seeds"] and measured.stderr for measured in others)


def test_the_page_shows_the_table_and_the_map(study: dict[str, Any]) -> None:
    page = (ROOT / "docs" / "bitflip.md").read_text()
    assert summary(study) in page
    assert "](images/flip-kinds.svg)" in page


def test_what_the_page_says_in_words_holds(study: dict[str, Any]) -> None:
    at = {tuple(values): figures["byte_perplexity"].mean for values, figures in table(study).points}
    clean = at[0, 0, "weights", "mlp"]
    classes = {point[2:] for point in at}
    assert max(at[2.0**-12, 0, *rest] for rest in classes) <= 1.003 * clean
    assert max(at[0, 0.5, *rest] for rest in classes) <= 1.02 * clean
    for p in (2.0**-8, 2.0**-4):
        for layers in ("attention", "mlp"):
            assert at[p, 0, "weights", layers] > at[p, 0, "activations", layers]
        for operand in ("weights", "activations"):
            assert at[p, 0, operand, "mlp"] > at[p, 0, operand, "attention"]
    for rest in classes:
        assert at[2.0**-4, 0, *rest] > at[0, 2.0**-4, *rest], "sign and exponent matter most"


@pytest.mark.slow
def test_four_points_come_out_again(study: dict[str, Any], tmp_path: Path) -> None:
    """Bit for bit where processor and versions are those of the study, else within what the study's module allows."""
    expected, found = study["rerun"], rerun(tmp_path)
    if found["made_with"] == expected["made_with"]:
        assert found == expected
    points, again = (table({**study, "csv": one["csv"]}).points for one in (expected, found))
    assert [values for values, _ in again] == [values for values, _ in points]
    for (_, metrics), (values, others) in zip(points, again, strict=True):
        for name, measured in metrics.items():
            p_exp, _, operand, _ = values
            noisy = p_exp > 0 and operand == "activations"
            allowed = RERUN_ERRORS * math.hypot(measured.stderr or 0, others[name].stderr or 0) if noisy else 0
            allowed = max(allowed, expected["tolerance"] * measured.mean)
            assert others[name].mean == pytest.approx(measured.mean, abs=allowed), (values, name)
