"""The study of kills is of today's kill points, every kill was mended, and one is repeated here."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from studies.kills import at_point
from studies.report import load
from tests.faults.points import POINTS
from tests.workflow.clone import Clone
from tests.workflow.conftest import TARGETS, finished  # noqa: F401  (a fixture)

REPEATED = "collect: readable copy"


@pytest.fixture(scope="module")
def study() -> dict[str, Any]:
    return load("kills")


def test_every_point_of_today_was_killed_at(study: dict[str, Any]) -> None:
    killed = {row["kill"]: [row["event"], row["match"], row["nth"], tuple(row["remade"])] for row in study["points"]}
    assert killed == {name: list(dataclasses.astuple(point)) for name, point in POINTS.items()}


def test_every_kill_was_mended(study: dict[str, Any]) -> None:
    rows = [*study["points"], *study["random"]]
    assert {row["digest"] for row in rows} == {study["digest"]}
    for whom in ("Snakemake alone", "the process group"):
        assert sum(row["killed"] == whom for row in study["random"]) >= 2, whom
    assert all(row["survivors"] == 0 for row in study["random"] if row["killed"] == "the process group")


@pytest.mark.slow
def test_a_kill_is_mended_again(finished: Clone) -> None:
    assert at_point(finished, REPEATED, POINTS[REPEATED])["digest"] == finished.digest(*TARGETS)
