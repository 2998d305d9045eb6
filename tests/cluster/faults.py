"""What can happen to a running training on a cluster: each function does it to the training of a `Run`."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.cluster.minislurm import wait
from tests.cluster.run import Run


def scancel(run: Run) -> None:
    """Somebody cancels the job."""
    run.slurm.run("scancel", run.job())


def node_lost(run: Run) -> None:
    """Power cut on the node; it is back when Slurm has done with its failure (sooner, the failure would hit what it starts)."""
    job = run.job()
    node = run.slurm.field(job, "NodeList")
    run.slurm.lose_node(node)
    assert wait(lambda: run.slurm.field(job, "JobState") == "PENDING", 60), "Slurm did not requeue the job"
    assert wait(lambda: run.slurm.is_down(node), 120), f"lost {node}, but Slurm says {run.slurm.node_state(node)}"
    run.slurm.start_node(node)
    assert wait(lambda: node in run.slurm.idle(), 60), f"{node} did not come back: {run.slurm.node_state(node)}"
    # Slurm 22.05 takes a job back from a node that it is started on within seconds of the node's return. Slurm itself
    # lets it wait two minutes; only the tests lift that.
    time.sleep(20)


def slurmd_killed(run: Run) -> None:
    """The node's daemon dies and comes back; the job does not notice."""
    node = run.slurm.field(run.job(), "NodeList")
    run.slurm.stop_daemon(node)
    time.sleep(3)
    run.slurm.start_node(node)


def preempted(run: Run) -> None:
    """A job of a higher partition takes the node for a moment."""
    node = run.slurm.field(run.job(), "NodeList")
    urgent = ("sbatch", "--wait", "-p", "urgent", "-w", node, "--exclusive", "-t", "1", "-o", "/dev/null")
    run.slurm.run(*urgent, "--wrap=sleep 2")


def squeue_fails(run: Run) -> None:
    """No status can be had for a while."""
    run.switch.touch()
    time.sleep(12)
    run.switch.unlink()


def controller_away(run: Run) -> None:
    """slurmctld is restarted."""
    pid = int((run.slurm.folder / "run" / "slurmctld.pid").read_text())
    os.kill(pid, signal.SIGKILL)
    wait(lambda: not psutil.pid_exists(pid), 10)
    time.sleep(6)
    run.slurm.start_controller()
    assert wait(lambda: run.slurm.idle(), 30)


def out_of_memory(run: Run) -> None:
    """The kernel kills the stage's process, which can say nothing any more."""
    for process in psutil.process_iter():
        try:
            command = process.cmdline()
            if command[1:4] == ["-m", "pipeline_lib", "stage"] and Path(process.cwd()) == run.clone.root:
                process.kill()
        except psutil.Error:
            continue


def snakemake_killed(run: Run) -> None:
    """The orchestrator dies; the same command is given again."""
    run.kill()
    run.start(*run.arguments)


FAULTS: dict[str, Callable[[Run], None]] = {
    "scancel": scancel,
    "node lost": node_lost,
    "slurmd killed": slurmd_killed,
    "preempted": preempted,
    "squeue fails": squeue_fails,
    "slurmctld away": controller_away,
    "out of memory": out_of_memory,
    "snakemake killed": snakemake_killed,
}
"""By name; `time limit` is not among them: a job that has one of a minute meets it by itself."""
