"""SIGKILL of the whole process group at exact points; the same command then ends in the same digest.

CI runs a few points, most of them for one target; `make study-kills` runs all, for all targets, and commits the table.
"""

from __future__ import annotations

import os
import random
import signal
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from pipeline_lib.artifacts.files import read_json
from tests.faults.kill import alive, forget, kill_and_repeat
from tests.faults.points import IN_CI, POINTS, TRAIN
from tests.workflow.clone import Clone
from tests.workflow.conftest import CONFIG, TARGETS, finished  # noqa: F401  (a fixture)

ONE = TARGETS[:1]
"""Enough for most: four stages beyond the data."""


@pytest.fixture
def clone(finished: Clone, tmp_path: Path) -> Clone:
    copy = Clone.make(tmp_path / "clone", CONFIG)
    copy.copy_results_from(finished)
    return copy


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_CI)
def test_killed_anywhere_the_same_command_ends_the_same(name: str, clone: Clone) -> None:
    targets = TARGETS if "sweep" in name else ONE
    before = clone.digest(*targets)
    assert kill_and_repeat(clone, POINTS[name], targets)["digest"] == before


@pytest.mark.slow
def test_killed_with_wandb_on(clone: Clone) -> None:
    """Its service is in a session of its own, so the kill misses it: it must end by itself, and hold nothing up."""
    before = clone.digest(*ONE)
    clone.write_config({**CONFIG, "tracking": {"wandb": "offline"}})
    assert kill_and_repeat(clone, POINTS["train: first log line"], ONE)["digest"] == before
    deadline = time.monotonic() + 30
    while alive(clone.root, b"wandb-core") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(clone.root, b"wandb-core")
    for training in (clone.root / "results/store/train").iterdir():
        assert list(training.glob("log/wandb/offline-run-*/*.wandb")), "the run is kept with the artifact"


@pytest.mark.slow
def test_killed_orchestrator_leaves_a_job_that_is_waited_for(clone: Clone) -> None:
    """SIGKILL of Snakemake alone: the stage lives on; the same command waits for it and adopts its work."""
    before = clone.digest(*ONE)
    forget(clone, POINTS["train: weights written"].remake)
    process = clone.start(*ONE)
    work = clone.root / "results" / "work"
    deadline = time.monotonic() + 120
    while not list(work.glob("train--*/checkpoints")) and time.monotonic() < deadline:
        time.sleep(random.Random(3).uniform(0.02, 0.05))
    os.kill(process.pid, signal.SIGKILL)
    killed = datetime.now(UTC)
    process.wait()
    assert alive(clone.root), "the stage should have survived its orchestrator"
    clone.snakemake(*ONE)
    assert clone.digest(*ONE) == before
    records = [read_json(path) for path in (clone.root / "results/store/train").glob("*/log/provenance.json")]
    assert any(datetime.fromisoformat(record["started"]) <= killed for record in records), "the orphan's work was lost"


@pytest.mark.slow
def test_second_orchestrator_says_why_it_stops(clone: Clone) -> None:
    before = clone.digest(*ONE)
    forget(clone, POINTS["convert: config"].remake)
    first = clone.start(*ONE)
    lock = clone.root / "results" / ".orchestrator.lock"
    deadline = time.monotonic() + 60
    while not alive(clone.root) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert lock.exists()
    second = clone.snakemake(*ONE, ok=False)
    assert "another snakemake (pid" in second
    output, _ = first.communicate(timeout=300)
    assert first.returncode == 0, output[-3000:]
    assert clone.digest(*ONE) == before


DAMAGE = {
    "weights, flipped byte": ("convert/pretrain-plain-*/model.safetensors", "flip"),
    "tokens, truncated": ("tokens/*/train-*.safetensors", "truncate"),
    "documents, flipped byte": ("dataset/*/test-*.parquet", "flip"),
    "result, truncated": ("evaluate/pretrain-plain-*-plain-*/result.json", "truncate"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found_and_remade_by_the_same_command(name: str, clone: Clone) -> None:
    pattern, how = DAMAGE[name]
    before = clone.digest(*ONE)
    store = clone.root / "results" / "store"
    readers = {"convert": ("evaluate",), "tokens": TRAIN, "dataset": ("evaluate",), "evaluate": ("result",)}
    [path, *_] = sorted(store.glob(pattern))
    forget(clone, (*readers[path.parent.parent.name], "result", "sweep"))
    if how == "flip":
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
    else:
        os.truncate(path, path.stat().st_size // 2)
    output = clone.snakemake(*ONE)
    assert "DAMAGED" in output
    assert list((clone.root / "results" / "quarantine").glob("*--*"))
    assert clone.digest(*ONE) == before
