"""What became of attempts, and what the next one makes of it."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline_lib.artifacts.locks import exclusive
from pipeline_lib.config.plan import Plan
from pipeline_lib.stages import allocation, attempts, wiring
from tests.conftest import ROOT

NAME = "train--pretrain-plain-0123456789ab"


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    folder = Path("results/work") / NAME
    folder.mkdir(parents=True)
    return folder


def test_a_kill_without_a_word_counts(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert attempts.killed(work) == 0
    attempts.begin(work)
    assert attempts.killed(work) == 1
    monkeypatch.setenv("SLURM_JOB_ID", "2")
    second = attempts.begin(work)
    assert second.killed == 1
    assert attempts.killed(work) == 2
    attempts.end(work, second, attempts.FAILED, "an error")
    assert attempts.killed(work) == 1, "an error of ours is not for want of memory"


def test_a_job_that_slurm_requeued_does_not_count(work: Path) -> None:
    attempts.begin(work)
    assert attempts.begin(work).killed == 0


def test_outside_slurm_nothing_counts(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID")
    attempts.begin(work)
    assert attempts.killed(work) == 0


def test_a_torn_note_is_no_note(work: Path) -> None:
    (work / attempts.NOTE).write_text('{"started": 1')
    assert attempts.read(work) is None
    assert attempts.killed(work) == 0


@pytest.mark.parametrize(
    ("state", "message", "words"),
    [
        (attempts.RUNNING, "", ["was killed without a word", "Slurm job 1", "run.mem_mb"]),
        (attempts.STOPPED, "", ["stopped in good order", "goes on"]),
        (attempts.FAILED, "ValueError: x", ["failed in Slurm job 1", "ValueError: x", "see the log"]),
        (attempts.REFUSED, "heads must divide dim", ["refused", "heads must divide dim", "mend"]),
    ],
)
def test_failures_name_stage_job_log_and_fix(state: str, message: str, words: list[str], work: Path) -> None:
    began = time.time() - 1
    attempts.end(work, attempts.begin(work), state, message)
    [told] = attempts.failures(began)
    for word in [*words, "train pretrain-plain-0123456789ab", "results/logs/train/pretrain-plain-0123456789ab.log"]:
        assert word in told
    assert attempts.failures(time.time() + 1) == [], "of an earlier run"


def test_a_job_that_never_came_to_its_stage_is_told(work: Path) -> None:
    """What could run, of which no attempt of this run is noted; neither what waits for others nor what runs here."""
    name, other = NAME.removeprefix("train--"), "other-0123456789ab"

    def job(node_id: str, **given: Any) -> SimpleNamespace:
        rule, wildcards = SimpleNamespace(name="train"), SimpleNamespace(id=node_id)
        return SimpleNamespace(**{"rule": rule, "wildcards": wildcards, "is_local": False, "input": [], **given})

    waiting = [job(other, input=["results/nothing"]), job(other, is_local=True)]
    workflow: Any = SimpleNamespace(dag=SimpleNamespace(needrun_jobs=lambda: [job(name), *waiting]))
    assert wiring._never_begun(workflow) == [("train", name)]
    told = attempts.never_begun("train", name)
    for word in (f"train {name} was not begun", "results/logs/slurm", "fix:", "slurm/partitions.yaml"):
        assert word in told
    attempts.begin(work)
    assert wiring._never_begun(workflow) == [], "its own last words are told instead"


def test_what_is_still_at_work_has_not_failed(work: Path) -> None:
    attempts.begin(work)
    with exclusive(work.with_name(f"{NAME}.lock"), "x"):
        assert attempts.failures(0) == []
    assert len(attempts.failures(0)) == 1


def test_a_job_that_lives_on_raises_no_memory(work: Path) -> None:
    """What waits for the job of a killed orchestrator asks for the memory of a first try."""
    plan = Plan.load(str(ROOT / "config.yaml"))
    name = NAME.removeprefix("train--")
    assert allocation.memory(plan, "train", name, "mem_mb", 1000) == 1000
    attempts.begin(work)
    with exclusive(work.with_name(f"{NAME}.lock"), "x"):
        assert allocation.memory(plan, "train", name, "mem_mb", 1000) == 1000
    assert allocation.memory(plan, "train", name, "mem_mb", 1000) == 2000
