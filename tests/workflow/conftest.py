"""One finished tiny pipeline, shared by the workflow tests (each works on a copy)."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
from filelock import FileLock

from tests.workflow.clone import TINY, Clone

TARGETS = ("results/plain-tiny/words.json", "results/bitflip-tiny/words.json", "results/sweeps/p.csv")
CONFIG = copy.deepcopy(TINY)
CONFIG["experiments"]["plain-tiny-flipped"] = {"from": "plain-tiny", "transform": "bitflip"}
CONFIG["sweeps"]["p"] = {
    "experiment": "plain-tiny-flipped",
    "task": "words",
    "grid": {"transform.bitflip.weight.p": [0.0, 1e-2]},
}


def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all test workers of this session share, and no other session."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """A clone in which the targets have been made, once for all test workers."""
    root = once(tmp_path_factory) / "finished-pipeline"
    with FileLock(f"{root}.lock"):
        if (root / "done").exists():
            return Clone(root)
        clone = Clone.make(root, CONFIG)
        clone.snakemake(*TARGETS)
        (root / "done").touch()
    return clone


@pytest.fixture
def copied(finished: Clone, tmp_path: Path) -> Clone:
    """A copy of the finished clone, `.snakemake` included."""
    clone = Clone.make(tmp_path / "clone", CONFIG)
    clone.copy_results_from(finished)
    clone.copy_snakemake_from(finished)
    return clone
