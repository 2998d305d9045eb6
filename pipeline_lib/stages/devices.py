"""Which GPUs a stage gets on this machine, and how many processes a training."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipeline_lib.artifacts.locks import exclusive, try_hold

LOCKS = Path(tempfile.gettempdir()) / f"errata-gpus-{os.getuid()}"
POLL_S = 2.0


def visible_gpus() -> list[str]:
    """GPUs that CUDA would see here, by index or UUID; asked without torch, which fixes its list when it is loaded."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name.strip() for name in given.split(",") if name.strip() not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    shown = subprocess.run(["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"], capture_output=True, text=True)
    return shown.stdout.split() if shown.returncode == 0 else []


@lru_cache(maxsize=1)
def claim_gpus(wanted: int) -> list[str]:
    """Make free GPUs the only visible ones, for the life of this process; wait while there are too few.

    Slurm gives a job its GPUs; on one machine, where Snakemake runs several stages at a time, a kernel lock on each GPU
    does. Fewer than `wanted` are taken where the machine has fewer. To be called before torch is loaded.
    """
    visible = visible_gpus()
    wanted = min(wanted, len(visible))
    if wanted == 0 or "SLURM_JOB_ID" in os.environ:
        return visible[:wanted]
    mine: list[str] = []
    with exclusive(LOCKS / "claim", f"claiming {wanted} of {len(visible)} GPUs"):  # two that wait with half each: never
        while len(mine) < wanted:
            for gpu in visible:
                if gpu not in mine and len(mine) < wanted and try_hold(LOCKS / gpu) is None:
                    mine.append(gpu)
            if len(mine) < wanted:
                time.sleep(POLL_S)
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
    return mine


def processes(execution: dict[str, Any]) -> int:
    """As many as `gpus` asks for and the machine has; without a GPU `cpu_processes` (default 1).

    The number changes speed only: data order, masks and the global batch do not depend on it.
    """
    import torch

    if torch.cuda.is_available():
        return max(1, min(int(execution.get("gpus") or 1), torch.cuda.device_count()))
    return int(execution.get("cpu_processes") or 1)
