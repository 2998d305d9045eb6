"""Run one stage: adopt or make the artifact, under its lock, from its frozen spec."""

from __future__ import annotations

import importlib
import math
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

from pipeline_lib.artifacts.files import read_json, write_json
from pipeline_lib.artifacts.job import Job
from pipeline_lib.artifacts.locks import Busy, exclusive
from pipeline_lib.artifacts.progress import say
from pipeline_lib.artifacts.provenance import provenance
from pipeline_lib.artifacts.store import (
    LOG,
    MANIFEST,
    STORE,
    Damaged,
    lock_file,
    mark,
    not_in_the_future,
    publish,
    report_damage,
    set_aside,
    verify,
    work_directory,
)
from pipeline_lib.config.errors import Stopped, UserError
from pipeline_lib.config.nodes import execution_path, spec_path
from pipeline_lib.config.stages import STAGES
from pipeline_lib.stages import attempts, slurm
from pipeline_lib.stages.devices import claim_gpus, processes

EXIT_DAMAGED_INPUT, EXIT_STOPPED = 65, 75
PATIENCE_S = 60.0
"""How long a job of a cluster waits for one that is at the same artifact, before it gives its node back for a while."""
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def read_spec(stage: str, node_id: str) -> dict[str, Any]:
    """A frozen spec.

    Raises:
        UserError: nothing was planned under that name.
    """
    path = spec_path(stage, node_id)
    try:
        return read_json(path)
    except FileNotFoundError:
        raise UserError(
            "no such spec", where=str(path), fix="run it through snakemake, which freezes the specs"
        ) from None


def run_stage(manifest: Path, threads: int | None = None) -> int:
    """Make (or adopt) the artifact whose manifest is `manifest`; returns the exit code."""
    artifact = manifest.parent
    spec = read_spec(artifact.parent.name, artifact.name)
    signal.signal(signal.SIGTERM, _stop)
    patience = PATIENCE_S if slurm.job_id() else math.inf
    try:
        with exclusive(lock_file(artifact), str(artifact), patience) as lock:
            os.set_inheritable(lock.fileno(), True)  # a worker that outlives this process keeps the lock
            return _adopt_or_make(artifact, spec, threads)
    except (Busy, Stopped) as stop:  # before the stage's own code began; `make` answers for that
        say(str(stop))
        slurm.requeue()
        return EXIT_STOPPED


def _adopt_or_make(artifact: Path, spec: dict[str, Any], threads: int | None) -> int:
    if adopt(artifact, spec["fingerprint"]):
        return 0
    if spec["stage"] == "sweep":
        from pipeline_lib.stages.cells import make_missing_cells

        code = make_missing_cells(spec, threads)
        if code:
            return code
    try:
        inputs = verified_inputs(spec)
    except Damaged:
        return EXIT_DAMAGED_INPUT
    return make(artifact, spec, inputs, threads)


def _stop(_signal: int, _frame: object) -> None:
    raise Stopped("stopped by SIGTERM")


def adopt(artifact: Path, expected: str) -> bool:
    """Whether a whole artifact is there already; what is there and is not whole is set aside."""
    if not artifact.exists():
        return False
    try:
        verify(artifact, expected)
    except Damaged as error:
        if any(path.name != MANIFEST for path in artifact.iterdir()):
            set_aside(artifact, str(error))
        return False
    say(f"{artifact} is there and whole: adopted")
    mark(artifact)
    shutil.rmtree(work_directory(artifact), ignore_errors=True)
    return True


def verified_inputs(spec: dict[str, Any]) -> dict[str, Path]:
    """The upstream artifacts, each verified byte for byte.

    Raises:
        Damaged: one is not whole; it has been reported for the next plan.
    """
    inputs = {}
    for role, upstream in spec["inputs"].items():
        path = STORE / upstream["stage"] / upstream["id"]
        try:
            verify(path, upstream["fingerprint"])
        except Damaged as error:
            report_damage(path, str(error))
            raise
        not_in_the_future(path / MANIFEST)
        inputs[role] = path
    return inputs


def make(artifact: Path, spec: dict[str, Any], inputs: dict[str, Path], threads: int | None) -> int:
    """Run the stage in its work directory and publish what it leaves in out/."""
    stage, started = spec["stage"], time.time()
    if not STAGES[stage].network:
        os.environ.update(OFFLINE)
    execution_file = execution_path(stage, artifact.name)
    execution = read_json(execution_file) if execution_file.exists() else {}
    work = work_directory(artifact)
    out = work / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    if threads is not None:
        execution["threads"] = threads
    if stage in ("train", "teacher", "clip", "timing", "score", "evaluate"):
        claim_gpus(max(1, execution.get("gpus") or 1) if stage in ("train", "teacher") else 1)
    if stage in ("train", "teacher"):
        execution["processes"] = processes(execution)
    if stage == "train":
        execution.setdefault("time_limit_s", slurm.seconds_left())
    slurm.name_job(execution.get("experiment"))
    job = Job(stage, spec["label"], spec["fingerprint"], spec["settings"], inputs, work, out, execution)
    attempt = attempts.begin(work)
    try:
        importlib.import_module(f"pipeline_lib.stages.{stage}").run(job)
    except Stopped as stop:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends already
        attempts.end(work, attempt, attempts.STOPPED)
        say(f"{artifact}: {stop}; its state is in {work}: give the same command again and it goes on")
        slurm.requeue()
        return EXIT_STOPPED
    except KeyboardInterrupt:
        attempts.end(work, attempt, attempts.STOPPED)
        raise
    except UserError as error:
        attempts.end(work, attempt, attempts.REFUSED, str(error))
        raise
    except Exception as error:
        attempts.end(work, attempt, attempts.FAILED, f"{type(error).__name__}: {error}")
        raise
    record(out, started)
    publish(out, artifact, spec)
    shutil.rmtree(work, ignore_errors=True)
    return 0


def record(out: Path, started: float) -> None:
    """Add provenance to the result files in `out`, and keep it beside them."""
    own = provenance(started, time.time())
    write_json(out / LOG / "provenance.json", own)
    for path in out.glob("*.json"):
        value = read_json(path)
        if isinstance(value, dict) and "result" in value:
            write_json(path, {**value, "provenance": {**own, **value.get("provenance", {})}})
