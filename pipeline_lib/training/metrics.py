"""Training metrics: always JSONL, wandb unless it is off, and a line of progress."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

from pipeline_lib.artifacts.files import write_bytes
from pipeline_lib.artifacts.job import Job
from pipeline_lib.artifacts.progress import Progress, say


class MetricsLog:
    """One JSON object a logged step, in step order, each step once however often the job was resumed.

    Only rank 0 makes one; the other ranks log nothing. The lines live in the work dir, are cut back to
    the step a run resumes from, and are copied to the artifact by `close`.

    Every line has `step` (optimizer steps done), `seconds` (wall time since this process began to train)
    and the figures given; non-finite figures are written as null, since JSON has no NaN.

    Args:
        out_file: where `close` puts the finished log, below `out/log/`.
        work_file: the log in the work dir.
        job: names the run, and its `execution.tracking` says what to do with wandb.
        steps: the last step, for the time left; None where nobody knows it.
        resumed_step: the checkpoint's step this run starts from; later lines are dropped.
    """

    def __init__(self, out_file: Path, work_file: Path, job: Job, steps: int | None, resumed_step: int = 0) -> None:
        self._out, self._work = out_file, work_file
        self._start = time.monotonic()
        _truncate(work_file, resumed_step)
        if resumed_step:
            say(f"{job.label or job.stage}: goes on from step {resumed_step}")
        self._progress = Progress(job.label or job.stage, steps, "steps", done=resumed_step)
        self._step = resumed_step
        self._wandb = _Wandb(job)

    def log(self, step: int, **figures: float) -> None:
        """Write the figures of `step` (optimizer steps done so far)."""
        line: dict[str, Any] = {"step": step, "seconds": round(time.monotonic() - self._start, 3)}
        line.update({name: value if math.isfinite(value) else None for name, value in figures.items()})
        with open(self._work, "a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
        self._wandb.log(step, figures)
        shown = {name: figures[name] for name in ("loss", "tokens_per_s", "progress") if name in figures}
        self._progress.update(step - self._step, **shown)
        self._step = step

    def close(self, finished: bool = True) -> None:
        """End the log; copy it to the artifact when the training is `finished`."""
        self._progress.__exit__(None, None, None)
        self._wandb.close()
        if finished:
            write_bytes(self._out, self._work.read_bytes() if self._work.exists() else b"")
            self._wandb.keep(self._out.parent / "wandb")


def _truncate(path: Path, step: int) -> None:
    """Keep the whole lines of `path` up to `step`; a kill may have torn the last one."""
    kept: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            if json.loads(line)["step"] > step:
                break
        except (ValueError, KeyError, TypeError):
            break
        kept.append(line + "\n")
    write_bytes(path, "".join(kept).encode())


class _Wandb:
    """A wandb run that may be off, and that can fail without ending a training; it says so once."""

    def __init__(self, job: Job) -> None:
        tracking = job.execution.get("tracking") or {}
        mode = tracking.get("wandb", "offline")
        self._folder = job.work / "wandb"
        self._run: Any = None
        if mode == "off" or os.environ.get("WANDB_MODE") == "disabled":  # wandb's own switch counts too
            return
        try:
            os.environ.setdefault("WANDB_SILENT", "true")
            if mode == "offline":  # else it reports on itself to its maker, offline or not
                os.environ["WANDB_ERROR_REPORTING"] = "false"
            import wandb

            job.work.mkdir(parents=True, exist_ok=True)
            self._run = wandb.init(
                project=tracking.get("project") or "errata",
                id=job.fingerprint[:16],
                name=job.label,
                group=job.execution.get("experiment") or job.label,
                job_type=job.stage,
                config=job.settings,
                dir=str(job.work),
                mode=mode,
                resume="allow",
                # Neither the machine, nor its git remote (which may hold a token), nor what a terminal showed.
                settings=wandb.Settings(
                    console="off", disable_git=True, save_code=False, x_disable_meta=True, x_disable_machine_info=True
                ),
            )
        except Exception as error:
            self._fail(error)

    def log(self, step: int, figures: dict[str, float]) -> None:
        if self._run is not None:
            try:
                self._run.log(figures, step=step)
            except Exception as error:
                self._fail(error)

    def close(self) -> None:
        if self._run is not None:
            try:
                self._run.finish()
            except Exception as error:
                self._fail(error)

    def keep(self, target: Path) -> None:
        """Copy the offline run into the artifact, so that `wandb sync` finds it after the work dir is gone."""
        if self._folder.is_dir():
            shutil.copytree(self._folder, target, symlinks=False, dirs_exist_ok=True, ignore_dangling_symlinks=True)

    def _fail(self, error: Exception) -> None:
        # Tracking is a convenience: the same figures are in the JSONL log. Losing it must not lose the run.
        say(f"wandb failed and is off from here on ({type(error).__name__}: {error}); metrics.jsonl goes on")
        self._run = None
