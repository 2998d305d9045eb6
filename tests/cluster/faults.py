"""What can happen to a training on a cluster: each function does it to the training of a `Run`, which it finds held."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from datetime import datetime

import psutil

from pipeline_lib.artifacts.files import read_json
from tests.cluster.minislurm import wait
from tests.cluster.run import EVERY, Run


def scancel(run: Run) -> None:
    """Somebody cancels the job."""
    job = run.job()
    run.slurm.run("scancel", job)
    assert wait(lambda: run.state(job) != "RUNNING", 60)
    run.go_on()


def rejected(run: Run) -> None:
    """Somebody cancels the job, and what a killed Snakemake left waiting behind it; Slurm refuses the next one."""
    with run.failing("sbatch", times=1):
        for job in run.waiting():
            run.slurm.run("scancel", job)
        scancel(run)


def node_lost(run: Run) -> None:
    """Power cut on the node; it is back once the job runs on another."""
    job = run.job()
    node = run.slurm.field(job, "NodeList")
    run.slurm.lose_node(node)
    assert wait(lambda: run.state(job) == "PENDING", 120), f"Slurm did not requeue the job: {run.state(job)}"

    def runs_elsewhere() -> bool:
        run.slurm.start_now()
        return run.state(job) == "RUNNING"

    assert wait(runs_elsewhere, 180), f"the job did not start again: {run.state(job)}"
    run.slurm.start_node(node)
    assert wait(lambda: node in run.slurm.idle(), 60), f"{node} did not come back: {run.slurm.node_state(node)}"


def slurmd_killed(run: Run) -> None:
    """The node's daemon dies and comes back; the job does not notice."""
    node = run.slurm.field(run.job(), "NodeList")
    run.slurm.stop_daemon(node)
    run.go_on()
    run.wait_for_step(run.step() + EVERY)
    run.slurm.start_node(node)


def preempted(run: Run) -> None:
    """A job of a higher partition takes the node for a moment."""
    job = run.job()
    node = run.slurm.field(job, "NodeList")
    urgent = ("sbatch", "--parsable", "-p", "urgent", "-w", node, "--exclusive", "-t", "1", "-o", "/dev/null")
    other = run.slurm.run(*urgent, "--wrap=sleep 1").strip()
    assert wait(lambda: run.state(job) != "RUNNING", 60), f"{job} was not preempted"
    run.go_on()
    assert wait(lambda: run.state(other) == "COMPLETED", 60), f"{other} did not run: {run.state(other)}"


def preempted_for_good(run: Run) -> None:
    """The same where Slurm does not put back what it preempts: the job does that itself."""
    partition = f"PartitionName={run.slurm.field(run.job(), 'Partition')}"
    run.slurm.run("scontrol", "update", partition, "PreemptMode=CANCEL")
    preempted(run)
    run.slurm.run("scontrol", "update", partition, "PreemptMode=REQUEUE")


def time_limit(run: Run) -> None:
    """The slot is nearly up by the training's own clock, which is set to a fifth of the slot before the end (or 120 s).

    It was set when the stage began; lifting Slurm's limit now leaves a slow machine the time to save.
    """
    job = run.job()
    restarts, limit = (run.slurm.field(job, name) for name in ("Restarts", "TimeLimit"))
    end = datetime.fromisoformat(run.slurm.field(job, "EndTime")).timestamp()
    [note] = (run.clone.root / "results" / "work").glob("train--*/attempt.json")
    rest = end - read_json(note)["started"]
    run.slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    assert wait(lambda: time.time() > end - min(rest / 10, 60), rest)
    run.go_on()
    assert wait(lambda: run.slurm.field(job, "Restarts") != restarts, 120), f"not requeued: {run.log()[-2000:]}"
    run.slurm.run("scontrol", "update", f"JobId={job}", f"TimeLimit={limit}")


def squeue_fails(run: Run) -> None:
    """No status can be had: more often in a row than the executor bears of itself, which is five times."""
    with run.failing("squeue", times=8):
        pass
    run.go_on()


def controller_away(run: Run) -> None:
    """slurmctld is restarted."""
    run.go_on()
    pid = int((run.slurm.folder / "run" / "slurmctld.pid").read_text())
    os.kill(pid, signal.SIGKILL)
    wait(lambda: not psutil.pid_exists(pid), 10)
    time.sleep(6)
    run.slurm.start_controller()
    assert wait(lambda: run.slurm.idle(), 30)


def out_of_memory(run: Run) -> None:
    """The kernel kills the stage's process, which can say nothing any more."""
    for process in run.training():
        process.kill()


def snakemake_killed(run: Run) -> None:
    """The orchestrator dies; the same command is given again while the job is at work."""
    jobs = len(run.jobs_submitted())
    run.kill()
    run.start(*run.arguments)
    assert wait(lambda: len(run.jobs_submitted()) > jobs, 120), run.said()[-3000:]
    run.go_on()


FAULTS: dict[str, Callable[[Run], None]] = {
    "scancel": scancel,
    "sbatch rejects": rejected,
    "node lost": node_lost,
    "slurmd killed": slurmd_killed,
    "preempted": preempted,
    "preempted for good": preempted_for_good,
    "time limit": time_limit,
    "squeue fails": squeue_fails,
    "slurmctld away": controller_away,
    "out of memory": out_of_memory,
    "snakemake killed": snakemake_killed,
}
"""By name."""
