"""A pipeline that runs through Slurm, and what can be seen and done while its training is at work."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import yaml

from pipeline_lib.artifacts.files import read_json, sha256_file, write_bytes
from pipeline_lib.config.plan import Plan
from pipeline_lib.stages.wiring import freeze
from tests.cluster.minislurm import MiniSlurm, wait
from tests.workflow.clone import TINY, Clone

EVERY = 20  # steps between checkpoints
CONFIG = copy.deepcopy(TINY)
CONFIG["models"]["tiny"]["recipe"]["pretrain"].update(steps=240, global_batch=16)
CONFIG["models"]["tiny"]["run"].update(
    checkpoint_every=EVERY, log_every=1, mem_mb=3000, runtime_min=20, eval_mem_mb=3000, eval_runtime_min=20
)
RESULT = "results/plain-tiny/words.json"
QUICK = ("--slurm-init-seconds-before-status-checks", "2", "--max-status-checks-per-second", "2")
# The executor asks less and less often, at last every 180 s, which would decide how long a test takes.
SNAKEMAKE = """
from snakemake.cli import main
from snakemake_executor_plugin_slurm import Executor
Executor.next_seconds_between_status_checks = property(lambda self: 2, lambda self, value: None)
main()
"""
FAILS_WHEN_TOLD = """#!/bin/sh
[ -e "{switch}" ] && [ "$(wc -l < "{switch}")" -le "$(head -n 1 "{switch}")" ] || exec {command} "$@"
echo "{name} $*" >> "{switch}"
echo "{name}: error: told to fail" >&2
exit 1
"""


class Run:
    """`snakemake --profile slurm` in a clone whose jobs go to one node; unless told otherwise it makes the training alone.

    Args:
        slurm: the cluster.
        root: where the clone is made.
        node: the node of all jobs, or `cpu` and the like for a whole partition.
        config: of the clone.
        data_from: a clone whose results are taken over, but for the training.
    """

    def __init__(
        self, slurm: MiniSlurm, root: Path, node: str, config: dict[str, Any], data_from: Clone | None = None
    ) -> None:
        self.slurm, self.clone = slurm, Clone.make(root, config)
        if data_from is not None:
            self.clone.copy_results_from(data_from)
            shutil.rmtree(root / "results" / "store" / "train")
            shutil.rmtree(root / "results" / "logs")
        (root / "slurm" / "partitions.yaml").write_text(yaml.safe_dump({"partitions": {node: {"max_gpu": 0}}}))
        (root / "bin").mkdir()
        for name in ("squeue", "sbatch"):
            wrapper = root / "bin" / name
            text = FAILS_WHEN_TOLD.format(name=name, switch=self.switch(name), command=shutil.which(name))
            wrapper.write_text(text)
            wrapper.chmod(0o755)
        with contextlib.chdir(root):
            plan = Plan.load()
            plan.view(f"results/{next(iter(config['experiments']))}/{next(iter(config['tasks']))}.json")
            for planned in plan.nodes.values():
                freeze(planned)
        train = next(planned for planned in plan.nodes.values() if planned.stage == "train")
        self.ranks = train.execution.get("nodes", 1) * train.execution.get("cpu_processes", 1)
        self.target = f"{train.path}/manifest.json"
        self.process: subprocess.Popen[bytes] | None = None
        self.held: list[psutil.Process] = []
        self.output = root / "output"

    def start(self, *arguments: str) -> None:
        """Start Snakemake, for the training where `arguments` name no target; its output is added to `output`."""
        self.arguments = arguments or (self.target,)
        command = [sys.executable, "-c", SNAKEMAKE, "--profile", "slurm", *QUICK, *self.arguments]
        path = f"{self.clone.root}/bin{os.pathsep}{os.environ['PATH']}"
        with open(self.output, "ab") as output:
            self.process = subprocess.Popen(
                command, cwd=self.clone.root, env=self.clone.environment({"PATH": path}),
                stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip

    def finish(self, seconds: float = 400, ok: bool = True) -> str:
        """Wait for Snakemake's end, lifting the delay of requeued jobs; its output."""
        assert self.process is not None
        end = time.monotonic() + seconds
        while self.process.poll() is None:
            if time.monotonic() > end:
                self.kill()
                raise TimeoutError(self.said()[-5000:] + self.slurm.run("squeue", "--states=all"))
            self.slurm.start_now()
            time.sleep(0.5)
        assert (self.process.returncode == 0) == ok, self.said()[-5000:]
        return self.said()

    def weights(self) -> str:
        """SHA-256 of the trained weights."""
        return sha256_file((self.clone.root / self.target).with_name("model.safetensors"))

    def kill(self) -> None:
        """SIGKILL to Snakemake and its local jobs."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def switch(self, command: str) -> Path:
        """The file that lets a Slurm command fail: how often, and a line for each time that it did."""
        return self.clone.root / f"{command}-fails"

    @contextlib.contextmanager
    def failing(self, command: str, times: int) -> Iterator[None]:
        """Let the next `times` calls of a command by this clone's Snakemake fail, and wait for them."""
        switch = self.switch(command)
        write_bytes(switch, f"{times}\n".encode())
        yield
        assert wait(lambda: len(switch.read_text().splitlines()) > times, 120), f"{command} was hardly called"
        switch.unlink()

    def hold(self, step: int, seconds: float = 300) -> None:
        """Let the training stand still at `step` or soon after: whatever the machine's speed, it is at work when a fault
        comes.

        Raises:
            TimeoutError: it did not get there.
        """
        end, found = time.monotonic() + seconds, list[psutil.Process]()
        while not found or self.step() < step:
            if time.monotonic() > end or self.process_ended():
                raise TimeoutError(f"step {self.step()}\n{self.said()[-4000:]}\n{self.slurm.run('squeue')}")
            if not found or not found[0].is_running():
                self.slurm.start_now()
                found = self.training()
            time.sleep(0.02)
        for process in found:
            process.suspend()
        self.held = found

    def go_on(self) -> None:
        """Let the training that was held go on."""
        for process in self.held:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()
        self.held = []

    def training(self) -> list[psutil.Process]:
        """The processes of the job that trains: the stage's own, or of a training with several its ranks."""
        words = {"pipeline_lib.training.worker"} if self.ranks > 1 else {"pipeline_lib", "stage", self.target}
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, ValueError):  # no note yet
                if words <= set(process.cmdline()) and Path(process.cwd()) == self.clone.root:
                    found += [process] if process.environ().get("SLURM_JOB_ID") == self.job() else []
        return found if len(found) >= self.ranks else []

    def said(self) -> str:
        """What Snakemake has printed so far."""
        return self.output.read_text() if self.output.exists() else ""

    def step(self) -> int:
        """The last training step that was logged."""
        for path in (self.clone.root / "results" / "work").glob("train--*/metrics.jsonl"):
            lines = path.read_text().splitlines()
            return _step(lines[-1]) or _step(lines[-2]) if len(lines) > 1 else 0
        return 0

    def wait_for_step(self, step: int, seconds: float = 200) -> None:
        """Until the training has done `step` steps.

        Raises:
            TimeoutError: it has not.
        """
        end = time.monotonic() + seconds
        while self.step() < step and not self.process_ended() and time.monotonic() < end:
            self.slurm.start_now()
            wait(lambda: self.step() >= step or self.process_ended(), 2, 0.1)
        if self.step() < step:
            raise TimeoutError(f"step {self.step()}\n{self.said()[-4000:]}\n{self.slurm.run('squeue')}")

    def process_ended(self) -> bool:
        """Whether Snakemake has ended."""
        return self.process is not None and self.process.poll() is not None

    def job(self) -> str:
        """The job that trains, as its stage noted; another may wait for its end."""
        [note] = (self.clone.root / "results" / "work").glob("train--*/attempt.json")
        return read_json(note)["job"]

    def waiting(self) -> list[str]:
        """Jobs of this clone that wait in the queue."""
        shown = self.slurm.run("squeue", "-h", "-t", "PENDING", "-o", "%i|%Z").splitlines()
        return [job for job, folder in (line.split("|") for line in shown) if folder == str(self.clone.root)]

    def state(self, job: str) -> str:
        """Slurm's word for a job's state."""
        return self.slurm.field(job, "JobState")

    def jobs_submitted(self) -> list[str]:
        """Numbers of all jobs that Snakemake says it submitted for the training."""
        return re.findall(r"SLURM jobid (\d+) \(log: \S*/rule_train/", self.said())

    def resumed_from(self) -> list[int]:
        """The steps that trainings went on from, in order."""
        return [int(step) for step in re.findall(r"goes on from step (\d+)", self.log())]

    def log(self) -> str:
        """What the training's stage has printed in all its attempts."""
        logs = list((self.clone.root / "results" / "logs" / "train").glob("*.log.all"))
        return logs[0].read_text() if logs else ""


def _step(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except ValueError:  # being written
        return 0
