"""Starts the ranks of a training with torchrun's launcher, on one node or, inside a Slurm job, on several."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from pipeline_lib.artifacts.files import read_json
from pipeline_lib.artifacts.job import Job
from pipeline_lib.config.errors import Stopped, UserError
from pipeline_lib.training.settings import option
from pipeline_lib.training.worker import FAILURE_FILE, LAUNCHER_VARIABLE, STOPPED_FILE, die_with_parent

SHUTDOWN_S = 120
"""How long ranks may take to save and end after a SIGTERM before they are killed."""
_HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


def launch(job: Job) -> None:
    """Run the job's ranks and wait for them.

    A SIGTERM is passed on to every rank. When one rank dies the others are ended.

    Raises:
        Stopped: the ranks saved their state and stopped on request.
        UserError: a rank refused the settings, or several nodes were asked for outside a Slurm job.
        RuntimeError: a rank failed; its traceback is in the log.
    """
    job.work.mkdir(parents=True, exist_ok=True)
    for name in (STOPPED_FILE, FAILURE_FILE):
        (job.work / name).unlink(missing_ok=True)
    job_file = job.work / "job.json"
    job.save(job_file)
    nodes = option(job, "nodes", 1)
    failure = _over_nodes(job_file, nodes) if nodes > 1 else on_this_node(job_file)
    if failure is None:
        return
    if (job.work / FAILURE_FILE).exists():
        raise UserError(read_json(job.work / FAILURE_FILE)["message"])
    if (job.work / STOPPED_FILE).exists():
        raise Stopped(read_json(job.work / STOPPED_FILE)["message"])
    if type(failure).__name__ == "SignalException":  # before the ranks could begin, or they took too long to save
        raise Stopped(f"stopped ({failure}); the newest checkpoint counts")
    raise RuntimeError(f"{job.label}: a training process failed ({failure}); its traceback is above") from failure


def on_this_node(job_file: Path, nodes: int = 1, endpoint: str = "127.0.0.1:0") -> Exception | None:
    """Run this node's ranks; what torchrun's launcher raised, or None when every rank ended well."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    job = Job.load(job_file)
    processes = option(job, "processes", 1)
    os.environ[LAUNCHER_VARIABLE] = str(os.getpid())
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_S))
    threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    os.environ["OMP_NUM_THREADS"] = str(max(threads // processes, 1))  # the stage's threads are shared out
    config = LaunchConfig(
        min_nodes=nodes,
        max_nodes=nodes,
        nproc_per_node=processes,
        run_id=job.fingerprint[:16],
        rdzv_backend="c10d",
        rdzv_endpoint=endpoint,  # port 0 on loopback: torchrun picks a free one
        rdzv_configs={"timeout": 900},
        max_restarts=0,  # a resumed run is a new run of the same command
        local_addr="127.0.0.1" if nodes == 1 else None,
    )
    former: dict[int, Any] = {number: signal.getsignal(number) for number in _HANDLED}
    try:
        elastic_launch(config, sys.executable)("-m", "pipeline_lib.training.worker", str(job_file))
    except (ChildFailedError, SignalException) as failure:
        return failure
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
    return None


def _over_nodes(job_file: Path, nodes: int) -> Exception | None:
    """Run `on_this_node` once a node of the surrounding Slurm job; a failure, or None."""
    hosts = _slurm_hosts()
    if len(hosts) < nodes:
        raise UserError(
            f"{nodes} nodes asked for, {len(hosts)} at hand: several nodes need a Slurm job that holds them",
            where="execution.nodes",
            value=nodes,
            fix="run with --profile slurm, or set nodes: 1",
        )
    # A port from the job id: two jobs on one node meet different ones.
    endpoint = f"{_address(hosts[0])}:{20000 + int(os.environ['SLURM_JOB_ID']) % 20000}"
    command = ["srun", "--overlap", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1"]
    threads, gpus = Job.load(job_file).execution.get("threads"), Job.load(job_file).execution.get("gpus")
    command += [f"--cpus-per-task={threads}"] if threads else []  # srun would give a task one CPU
    command += [f"--gpus-per-node={gpus}"] if gpus else []
    command += ["--kill-on-bad-exit=1", sys.executable, "-m", "pipeline_lib.training.launch", str(job_file), endpoint]
    process = subprocess.Popen(command, preexec_fn=die_with_parent_of_fork)
    # To srun itself a SIGTERM means: kill the ranks at once. Slurm's own word reaches them instead.
    to_ranks = ["scancel", "--signal=TERM", os.environ["SLURM_JOB_ID"]]
    former = signal.signal(signal.SIGTERM, lambda number, frame: subprocess.Popen(to_ranks) and None)
    try:
        code = process.wait()
    finally:
        signal.signal(signal.SIGTERM, former)
    return None if code == 0 else subprocess.CalledProcessError(code, command)


def die_with_parent_of_fork() -> None:
    """`die_with_parent` between fork and exec, where the launcher is this process's parent by construction."""
    os.environ.pop(LAUNCHER_VARIABLE, None)
    die_with_parent()


def _slurm_hosts() -> list[str]:
    """Host names of the surrounding Slurm job; asked for, since Snakemake's executor strips SLURM_JOB_NODELIST."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or shutil.which("squeue") is None:
        return []
    listed = ["squeue", "--noheader", f"--jobs={job}", "--format=%N"]
    names = subprocess.run(listed, capture_output=True, text=True, check=True).stdout.strip()
    shown = subprocess.run(["scontrol", "show", "hostnames", names], capture_output=True, text=True, check=True)
    return shown.stdout.split()


def _address(node: str) -> str:
    """Where Slurm reaches a node, whose name need not be one that can be looked up."""
    shown = subprocess.run(["scontrol", "show", "node", node, "--oneliner"], capture_output=True, text=True).stdout
    match = re.search(r"\bNodeAddr=(\S+)", shown)
    return match.group(1) if match else node


if __name__ == "__main__":
    _nodes = int(Job.load(Path(sys.argv[1])).execution["nodes"])
    sys.exit(0 if on_this_node(Path(sys.argv[1]), _nodes, sys.argv[2]) is None else 1)
