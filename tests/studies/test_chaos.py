"""The study of faults on a cluster met every kind of today's, often enough, and nothing was lost but what may be."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from studies.report import load
from tests.cluster.faults import FAULTS


@pytest.fixture(scope="module")
def study() -> dict[str, Any]:
    return load("chaos")


def test_every_kind_was_met(study: dict[str, Any]) -> None:
    met = Counter(row["fault"] for row in study["faults"])
    assert set(met) == set(FAULTS)
    assert sum(met.values()) >= 25
    assert min(met.values()) >= 3


def test_no_more_than_one_checkpoint_interval_was_lost(study: dict[str, Any]) -> None:
    interval = study["settings"]["checkpoint_every"]
    assert all(0 <= row["steps_lost"] <= interval for row in study["faults"])
    for row in study["faults"]:
        if row["fault"] in ("scancel", "sbatch rejects", "preempted", "preempted for good", "time limit"):
            assert row["steps_lost"] == 0, "it was asked to stop, so it saved"
