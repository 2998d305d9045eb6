"""One writer an artifact, one orchestrator a results directory: kernel locks, freed by death."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from pipeline_lib.artifacts.progress import say

_HELD: list[IO[str]] = []  # the orchestrator's lock lives as long as the process


def _owner() -> str:
    job = os.environ.get("SLURM_JOB_ID")
    return f"pid {os.getpid()} on {os.uname().nodename}" + (f", Slurm job {job}" if job else "")


def _take(file: IO[str]) -> None:
    file.seek(0)
    file.truncate()
    file.write(_owner())
    file.flush()


@contextlib.contextmanager
def exclusive(path: Path, what: str) -> Iterator[IO[str]]:
    """Hold the lock file `path`; wait, and say so, while another process holds it.

    Yields the open file: a worker process that inherits its descriptor keeps the lock until it ends too.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            say(f"{what}: another process ({file.read().strip()}) is at it; waiting")
            fcntl.flock(file, fcntl.LOCK_EX)
        _take(file)
        yield file


def try_hold(path: Path) -> str | None:
    """Hold `path` for the life of this process; None, or who holds it already."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a+")  # noqa: SIM115  (kept open on purpose)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip()
        file.close()
        return holder or "unknown"
    _take(file)
    _HELD.append(file)
    return None


def is_held(path: Path) -> bool:
    """Whether some process holds `path` now."""
    if not path.exists():
        return False
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
