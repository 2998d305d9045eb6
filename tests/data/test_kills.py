"""SIGKILL at seeded points of dataset, tokens and downloads; the same command then ends in the same bytes."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline_lib.artifacts.job import Job
from tests.conftest import ROOT
from tests.data.files import settings, write
from tests.data.jobs import dataset_settings, digests, job, sentences
from tests.hub import FakeHub, wait_for

SEED = 20


def start(made: Job, at: int) -> subprocess.Popen[str]:
    """The stage in its own process and process group, as the runner would start it: with an empty out/."""
    shutil.rmtree(made.out, ignore_errors=True)
    made.out.mkdir(parents=True)
    made.save(made.work.parent / "job.json")
    command = [sys.executable, "-m", "tests.data.stage_process", str(made.work.parent / "job.json"), str(at)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "true"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, start_new_session=True
    )


def finish(made: Job) -> int:
    """Run to the end; returns the number of durable steps."""
    process = start(made, 0)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return int(out)


def check_kills(clean: Job, early: Job, late: Job) -> None:
    """`early` is killed three times before it is half done, `late` once while it publishes; both are then finished."""
    steps, rng = finish(clean), random.Random(SEED)
    assert steps > 20
    points = [(early, rng.randint(steps // 8, steps // 4)) for _ in range(3)]
    points.append((late, steps - rng.randint(0, 2)))
    for made, at in points:
        process = start(made, at)
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL, (made.work, at, steps)
    for made in (early, late):
        assert finish(made) < steps, "nothing was resumed"
        assert digests(made.out) == digests(clean.out)


@pytest.fixture
def source(tmp_path: Path) -> dict[str, Any]:
    return settings([str(write(tmp_path / f"{i:02d}.jsonl", sentences(40, i))) for i in range(12)])


@pytest.mark.parametrize("split", [{"valid": 0.1, "test": 0.1}, {"valid": 9, "test": 7}])
def test_dataset(source: dict[str, Any], tmp_path: Path, split: dict[str, float]) -> None:
    given = dataset_settings(source, split=split, max_bytes=80_000)
    check_kills(*(job("dataset", tmp_path / name, given) for name in ("clean", "early", "late")))


def test_tokens(dataset: Path, trained: Path, tmp_path: Path) -> None:
    jobs = [
        job("tokens", tmp_path / name, {"max_tokens": 20_000}, dataset=dataset, tokenizer=trained)
        for name in ("clean", "early", "late")
    ]
    check_kills(*jobs)


def downloaded(work: Path) -> int:
    """Bytes of the largest unfinished download."""
    sizes = [0]
    with contextlib.suppress(FileNotFoundError):  # one has just got its name
        sizes += [path.stat().st_size for path in work.rglob("*.part")]
    return max(sizes)


@pytest.mark.parametrize("stage", ["dataset", "assets"])
def test_download(hub: FakeHub, tmp_path: Path, stage: str) -> None:
    """Killed while the server has sent a part: the next run asks for the rest only."""
    data = "\n".join(sentences(4000)).encode()
    hub.add("dataset", "o/n", {"a.txt": b"first\n" * 30, "b.txt": data})
    given: dict[str, Any] = {"kind": "hub", "repo": "o/n", "repo_type": "dataset", "revision": "main", "patterns": None}
    if stage == "dataset":
        given = dataset_settings({"type": "hub", "repo": "o/n", "files": ["*.txt"], "separator": "\n"})
    clean, killed = job(stage, tmp_path / "clean", given), job(stage, tmp_path / "killed", given)
    finish(clean)
    hub.requests.clear()
    sent = 0
    for portion in (150_000, 100_000):
        hub.fail("*/b.txt", stall_after=portion)
        process = start(killed, 0)
        sent += portion
        wait_for(lambda: downloaded(killed.work) >= sent)  # noqa: B023
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait(timeout=10) == -signal.SIGKILL
        assert not list(killed.out.rglob("*.json")), "nothing that looks finished"
    hub.faults.clear()
    finish(killed)
    assert [request.range for request in hub.downloads("b.txt")] == [None, "bytes=150000-", "bytes=250000-"]
    assert len(hub.downloads("a.txt")) == 1
    assert digests(killed.out) == digests(clean.out)
