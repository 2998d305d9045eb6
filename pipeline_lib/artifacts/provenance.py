"""Where a result comes from: code, versions, hardware, dates, times."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "torchtitan",
    "datasets",
    "lm_eval",
    "tokenizers",
    "safetensors",
    "numpy",
)


@lru_cache(maxsize=1)
def commit() -> str:
    """The commit of the code, with `+changes` when the working tree differs; `unknown` outside git."""
    root = Path(__file__).resolve().parents[2]
    try:
        head = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}+changes" if changed else head


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=30)
    return done.stdout.strip()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that shape results."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """Processor, cores, and the GPUs that torch sees (only if this process has loaded torch)."""
    torch = sys.modules.get("torch")
    gpus = []
    if torch is not None and torch.cuda.is_available():
        gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"machine": platform.machine(), "processor": _processor(), "cores": os.cpu_count(), "gpus": gpus}


def _processor() -> str:
    """Name; on x86 with family/model/stepping, which tell apart processors of one name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    first: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        first.setdefault(key.strip(), value.strip())
    numbers = [first[key] for key in ("cpu family", "model", "stepping") if key in first]
    return first.get("model name", platform.processor()) + (f" ({'/'.join(numbers)})" if numbers else "")


def provenance(started: float, ended: float) -> dict[str, Any]:
    """The record of one run of one stage; `started` and `ended` are Unix times in seconds."""
    return {
        "commit": commit(),
        "versions": versions(),
        "hardware": hardware(),
        "started": datetime.fromtimestamp(started, UTC).isoformat(timespec="seconds"),
        "wall_s": round(ended - started, 3),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
    }
