"""Faults of a cluster while the training runs: each ends in the documented outcome and in the same digest."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cluster import faults
from tests.cluster.minislurm import MiniSlurm, wait
from tests.cluster.run import CONFIG, EVERY, Run
from tests.workflow.clone import Clone


@dataclass(frozen=True)
class Outcome:
    """What a fault must end in.

    Attributes:
        node: where it happens; no two tests share one.
        jobs: how many jobs were submitted for the training.
        restarts: how often Slurm or the job itself requeued the last of them.
        resumed: whether the training went on from a checkpoint.
        saved: it was asked first, so no step was lost.
    """

    node: str
    jobs: int
    restarts: int
    resumed: bool
    saved: bool = False


OUTCOMES = {
    "scancel": Outcome("cpu1", 2, 0, resumed=True, saved=True),
    "sbatch rejects": Outcome("cpu12", 2, 0, resumed=True, saved=True),
    "node lost": Outcome("spare", 1, 1, resumed=True),
    "slurmd killed": Outcome("cpu3", 1, 0, resumed=False),
    "preempted": Outcome("cpu4", 1, 1, resumed=True, saved=True),
    "preempted for good": Outcome("cpu2", 1, 1, resumed=True, saved=True),
    "squeue fails": Outcome("cpu5", 1, 0, resumed=False),
    "out of memory": Outcome("cpu6", 2, 0, resumed=True),
    "snakemake killed": Outcome("cpu7", 2, 0, resumed=False),
}


@pytest.mark.parametrize("name", OUTCOMES)
def test_fault(name: str, slurm: MiniSlurm, undisturbed: Clone, weights: str, tmp_path: Path) -> None:
    fault: Callable[[Run], None] = faults.FAULTS[name]
    expected = OUTCOMES[name]
    run = Run(slurm, tmp_path / "clone", expected.node, CONFIG, undisturbed)
    run.start()
    run.hold(2 * EVERY + EVERY // 2)
    step = run.step()
    fault(run)
    said = run.finish()
    assert run.weights() == weights
    jobs = run.jobs_submitted()
    assert len(jobs) == expected.jobs, said[-3000:]
    assert slurm.field(jobs[-1], "Restarts") == str(expected.restarts)
    assert slurm.field(jobs[-1], "JobState") == "COMPLETED"
    resumed = run.resumed_from()
    assert len(resumed) == expected.resumed
    if expected.resumed:
        assert resumed[0] >= (step if expected.saved else step - EVERY)
    if name == "out of memory":
        assert [int(slurm.field(job, "MinMemoryNode").rstrip("M")) for job in jobs] == [3000, 6000]
    if name == "snakemake killed":
        assert slurm.field(jobs[0], "JobState") == "COMPLETED", "the orphan did the work"
        assert f"Slurm job {jobs[0]} (RUNNING) of an earlier run is at train" in said
        assert "adopts its work" in said


def test_a_short_time_limit_costs_no_retry(slurm: MiniSlurm, undisturbed: Clone, weights: str, tmp_path: Path) -> None:
    """The job saves by its own clock before the limit, requeues itself, and goes on under its own number."""
    config = copy.deepcopy(CONFIG)
    config["models"]["tiny"]["run"].update(runtime_min=1)
    run = Run(slurm, tmp_path / "clone", "cpu8", config, undisturbed)
    run.start()
    run.hold(1)
    job = run.job()
    faults.time_limit(run)
    slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=20")  # no further slot
    said = run.finish()
    assert run.jobs_submitted() == [job]
    assert int(slurm.field(job, "Restarts")) == len(run.resumed_from()) >= 1
    stopped = [int(step) for step in re.findall(r"stopped after step (\d+)", run.log())]
    assert stopped == run.resumed_from(), "no step is lost"
    assert "time limit near: saving, then stopping" in run.log()
    assert "requeued; it goes on from its last checkpoint" in run.log()
    assert "Error in rule" not in said
    assert run.weights() == weights


def test_ctrl_c_ends_the_jobs_and_leaves_nothing_behind(
    slurm: MiniSlurm, undisturbed: Clone, weights: str, tmp_path: Path
) -> None:
    """A cancelled job does not requeue itself."""
    run = Run(slurm, tmp_path / "clone", "cpu9", CONFIG, undisturbed)
    run.start()
    run.hold(EVERY)
    job = run.job()
    assert run.process is not None
    run.process.send_signal(2)
    assert wait(lambda: run.state(job) != "RUNNING", 60)
    run.go_on()
    run.process.wait(120)
    assert wait(lambda: slurm.field(job, "JobState") == "CANCELLED", 30)
    assert not wait(lambda: slurm.field(job, "JobState") != "CANCELLED", 5)
    before = run.step()
    run.start()
    run.finish()
    assert run.resumed_from()[0] >= before
    assert run.weights() == weights
