"""The cluster tests need the Slurm that `make test-cluster` brings up; without it they say that they did not run."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from pipeline_lib.artifacts.files import sha256_file
from tests.cluster.__main__ import FOLDER
from tests.cluster.minislurm import MiniSlurm
from tests.cluster.run import CONFIG, RESULT
from tests.workflow.clone import Clone
from tests.workflow.conftest import once

collect_ignore_glob = [] if FOLDER in os.environ else ["test_*.py"]


LONGEST = ("demos_plain_half", "time_limit", "node lost", "two_nodes")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests first: the others fill up what the workers have left."""
    if FOLDER in os.environ:
        items.sort(key=lambda item: next((at for at, name in enumerate(LONGEST) if name in item.name), len(LONGEST)))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if FOLDER not in os.environ:
        terminalreporter.write_line("NOT RUN: tests/cluster, which need a Slurm: `make test-cluster`")


@pytest.fixture(scope="session")
def slurm() -> MiniSlurm:
    return MiniSlurm(Path(os.environ[FOLDER]))


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """A training that nobody disturbed, made without Slurm, once for all test workers."""
    root = once(tmp_path_factory) / "undisturbed"
    with FileLock(f"{root}.lock"):
        if (root / "done").exists():
            return Clone(root)
        clone = Clone.make(root, copy.deepcopy(CONFIG))
        clone.snakemake("--until", "train", "--", RESULT)
        (root / "done").touch()
    return clone


@pytest.fixture(scope="session")
def weights(undisturbed: Clone) -> str:
    """SHA-256 of its weights."""
    [path] = (undisturbed.root / "results" / "store" / "train").glob("*/model.safetensors")
    return sha256_file(path)
