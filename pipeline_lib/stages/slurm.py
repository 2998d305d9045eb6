"""What a stage does differently inside a Slurm job: it knows its time limit, and requeues itself."""

from __future__ import annotations

import os
import subprocess
from typing import Any

from pipeline_lib.artifacts.progress import say


def time_limit_s(execution: dict[str, Any]) -> float | None:
    """Seconds this job may run: `runtime_min` inside Slurm, no limit elsewhere."""
    minutes = execution.get("runtime_min")
    return float(minutes) * 60 if minutes and "SLURM_JOB_ID" in os.environ else None


def requeue() -> None:
    """Put this job back into the queue under its own id, so that stopping in good order costs no retry."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return
    done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60)
    if done.returncode:
        say(f"Slurm job {job} could not be requeued ({done.stderr.strip()}); Snakemake submits it again")
    else:
        say(f"Slurm job {job} requeued; it goes on from its last checkpoint")
