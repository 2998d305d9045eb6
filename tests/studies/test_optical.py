"""The study of optical arithmetic is of today's settings, its arms are comparable, and one cell comes out again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from studies.defences import interval
from studies.optical import EXACT, LEVELS, MORE, STEPS, at_levels, rerun, settings
from studies.optical_page import ARMS, CLAIMS, JUDGED, difference, values, verdict
from studies.report import at_seed, load


@pytest.fixture(scope="module")
def study() -> dict[str, Any]:
    return load("optical")


def test_every_arm_has_every_level_and_at_least_three_seeds(study: dict[str, Any]) -> None:
    named = [*EXACT, *(f"{arm}.{levels}" for levels in LEVELS for arm in ARMS)]
    assert set(study["cells"]) == {at_seed(name, seed) for name in named for seed in study["seeds"]}
    assert len(set(study["seeds"])) == len(study["seeds"]) >= 3
    assert LEVELS == (2**4, 2**5, 2**6, 2**7, 2**8)


def test_settings_are_those_of_today(study: dict[str, Any]) -> None:
    """Whoever changes nano, the transform's defaults or the task runs the study again."""
    assert settings(study["seeds"]) == study["settings"]


def test_arms_differ_in_what_they_are_and_in_nothing_else(study: dict[str, Any]) -> None:
    """The same steps in all, the same batches, the same levels."""
    assert set(at_levels(16)) == set(ARMS)
    trained = study["settings"]["trainings"]
    steps = {name: own["recipe"]["steps"] for name, own in trained.items()}
    assert steps["clean"] + steps["full.256"] == steps["scratch.256"] == steps["ramp.256"] == STEPS + MORE
    assert steps["full.256"] == steps["lora.256"] == steps["clean-continued"] == MORE
    assert steps["clean-longer"] == STEPS + MORE
    for key in ("global_batch", "seq_len"):
        assert len({own["recipe"][key] for own in trained.values()}) == 1, key
    eased = dict(trained["ramp.256"]["transform"][0])
    assert eased.pop("ramp")["steps"] == (STEPS + MORE) // 2
    without = dict(trained["scratch.256"]["transform"][0])
    assert without.pop("ramp") is None
    assert eased == without == {k: v for k, v in trained["full.256"]["transform"][0].items() if k != "ramp"}


def test_differences_are_paired_and_verdicts_follow_the_interval(study: dict[str, Any]) -> None:
    pairs = zip(values(study, "full", 256), values(study, "post", 256), strict=True)
    assert difference(study, ("full",), ("post",), 256) == interval([own - other for own, other in pairs])
    arms = [values(study, arm, 16) for arm in ("full", "clean", "post", "clean-continued")]
    costs = [(own - exact) - (before - clean) for own, clean, before, exact in zip(*arms, strict=True)]
    found = difference(study, ("full", "clean"), ("post", "clean-continued"), 16)
    assert found == pytest.approx(interval(costs)), "what the arithmetic costs after continuing, minus before"
    assert verdict(-1.0, 0.5, True) == "supported"
    assert verdict(-1.0, 0.5, False) == "refuted"
    assert verdict(-1.0, 1.5, True) == verdict(-1.0, 1.5, False) == "open"
    for _, plus, minus, _ in CLAIMS:
        assert len(plus) == len(minus)
        assert {*plus, *minus} <= {*ARMS, *EXACT}
    assert set(JUDGED) <= set(LEVELS)


@pytest.mark.slow
def test_a_cell_comes_out_again(study: dict[str, Any], tmp_path: Path) -> None:
    """Bit for bit where processor and versions are those of the study, else within the tolerance it states."""
    expected, found = study["rerun"], rerun(tmp_path)
    if found["made_with"] == expected["made_with"]:
        assert found == expected
    assert not found["diverged"]
    assert found["mean"] == pytest.approx(expected["mean"], rel=expected["tolerance"])
