"""Training in several processes by torchrun's launcher: signals, kills, exit codes, orphans."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from pipeline_lib.artifacts.job import Job
from pipeline_lib.config.errors import UserError
from pipeline_lib.training import launch
from pipeline_lib.training.checkpoints import newest_good, step_of
from tests.training_bench import ROOT, Bench, Case

STEPS = 60
STAGE = """
import sys
from pathlib import Path
from pipeline_lib.artifacts.job import Job
from pipeline_lib.config.errors import Stopped
from pipeline_lib.stages.train import run
try:
    run(Job.load(Path(sys.argv[1])))
except Stopped as stop:
    print(stop)
    sys.exit(75)
"""

STOPPED_RANK = """
import sys, time
from pathlib import Path
from pipeline_lib.artifacts.job import Job
from pipeline_lib.config.errors import Stopped
from pipeline_lib.training import distributed, run, worker

def stop(job):
    distributed.start()
    raise Stopped("asked to")

def slowly(path, value, write=worker.write_json):
    time.sleep(1)
    write(path, value)

run.run_rank, worker.write_json = stop, slowly
code = worker.main(Path(sys.argv[1]))
assert (Job.load(Path(sys.argv[1])).work / worker.STOPPED_FILE).exists(), "ended before all had told"
sys.exit(code)
"""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(Case("cram", "llama"), tmp_path_factory.mktemp("launch"))


def start(work: Path) -> subprocess.Popen[str]:
    """The stage in a process of its own, as Snakemake runs it."""
    command = [sys.executable, "-c", STAGE, str(work / "stage.json")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)


def steps_logged(work: Path) -> int:
    path = work / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def wait_for(what: Callable[[], bool], seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def ranks_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The worker processes, by rank."""
    workers = [p for p in psutil.Process(process.pid).children(recursive=True) if "worker" in " ".join(p.cmdline())]
    return sorted(workers, key=lambda worker: int(worker.environ()["RANK"]))


def gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


@pytest.mark.slow
def test_two_processes_through_kills_and_signals(bench: Bench) -> None:
    """SIGKILL to the stage, SIGTERM to one rank, SIGTERM to the stage: in the end the undisturbed run's bytes."""
    undisturbed = bench.fresh("undisturbed", recipe={"steps": STEPS}, checkpoint_every=5)
    assert bench.run(undisturbed, world=2) == [0, 0]
    work = bench.fresh("launched", recipe={"steps": STEPS}, checkpoint_every=5, processes=2)
    os.rename(work / "job.json", work / "stage.json")

    killed = start(work)
    wait_for(lambda: steps_logged(work) >= 6)
    ranks = ranks_of(killed)
    assert len(ranks) == 2
    killed.kill()
    killed.wait()
    wait_for(lambda: all(gone(rank) for rank in ranks), 10)

    first = steps_logged(work)
    one_signalled = start(work)
    # Not by `newest_good`, which removes what is unfinished: here it is being written.
    wait_for(lambda: bool(list(work.glob("checkpoints/*/seal.json"))) and steps_logged(work) > first + 3)
    ranks_of(one_signalled)[1].send_signal(signal.SIGTERM)
    output, _ = one_signalled.communicate(timeout=60)
    assert one_signalled.returncode == 75, output
    newest = newest_good(work / "checkpoints")
    assert newest is not None
    assert f"stopped after step {step_of(newest)}" in output

    second = steps_logged(work)
    assert second == step_of(newest) < STEPS - 10
    signalled = start(work)
    wait_for(lambda: steps_logged(work) > second + 3)
    signalled.send_signal(signal.SIGTERM)
    assert signalled.wait(60) == 75

    last = start(work)
    assert last.wait(120) == 0
    bench.same_result(work, undisturbed)


@pytest.mark.slow
def test_a_workers_user_error_reaches_the_stage(bench: Bench) -> None:
    work = bench.fresh("wrong", processes=2, micro_batch=3)
    with pytest.raises(UserError, match="not a multiple of ranks × micro-batch"):
        launch.launch(Job.load(work / "job.json"))


def test_no_rank_ends_before_the_stop_is_noted(bench: Bench) -> None:
    """On several nodes the end of one's ranks is the end of all others."""
    work = bench.fresh("noted")
    command = [sys.executable, "-c", STOPPED_RANK, str(work / "job.json")]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shared = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
    }
    ranks = [subprocess.Popen(command, env={**shared, "RANK": rank, "LOCAL_RANK": rank}) for rank in ("0", "1")]
    assert [rank.wait(90) for rank in ranks] == [75, 75]


def test_several_nodes_need_slurm(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    job = Job.load(bench.fresh("nodes", nodes=2) / "job.json")
    with pytest.raises(UserError, match=r"2 nodes asked for, 0 at hand"):
        launch.launch(job)


def test_several_nodes_are_started_by_srun(bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One launcher a node, meeting at the first host; a failing srun is a failure of the training."""
    (tmp_path / "scontrol").write_text(
        "#!/bin/sh\n[ $2 = node ] && echo NodeName=$3 NodeAddr=10.0.0.7 Port=1 || printf 'n1\\nn2\\n'\n"
    )
    (tmp_path / "srun").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/called\nexit 3\n')
    (tmp_path / "squeue").write_text("#!/bin/sh\necho 'n[1-2]'\n")
    for name in ("scontrol", "squeue", "srun"):
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    job = Job.load(bench.fresh("srun", nodes=2, processes=4, gpus=4, threads=6) / "job.json")
    with pytest.raises(RuntimeError, match="a training process failed"):
        launch.launch(job)
    called = (tmp_path / "called").read_text()
    assert "--nodes=2 --ntasks=2 --ntasks-per-node=1 --cpus-per-task=6 --gpus-per-node=4" in called
    assert called.rstrip().endswith(f"{job.work / 'job.json'} 10.0.0.7:20007")
