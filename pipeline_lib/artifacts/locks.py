"""One writer an artifact, one orchestrator a results directory: kernel locks, freed by death."""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from pipeline_lib.artifacts.progress import say

POLL_S = 0.2
_HELD: list[IO[str]] = []  # the orchestrator's lock lives as long as the process


class Busy(Exception):
    """Another process still holds a lock for which one had only so much patience."""


def _owner() -> str:
    job = os.environ.get("SLURM_JOB_ID")
    return f"pid {os.getpid()} on {os.uname().nodename}" + (f", Slurm job {job}" if job else "")


def _take(file: IO[str]) -> None:
    file.seek(0)
    file.truncate()
    file.write(_owner())
    file.flush()


@contextlib.contextmanager
def exclusive(path: Path, what: str, patience_s: float = math.inf) -> Iterator[IO[str]]:
    """Hold the lock file `path`; wait, and say so, while another process holds it.

    Yields the open file: a worker process that inherits its descriptor keeps the lock until it ends too.

    Raises:
        Busy: it was not free within `patience_s` seconds.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as file:
        end = time.monotonic() + patience_s
        waits = False
        while not _try(file):
            file.seek(0)
            holder = f"another process ({file.read().strip()}) is at it"
            if not waits:
                say(f"{what}: {holder}; waiting")
            waits = True
            if time.monotonic() >= end:
                raise Busy(f"{what}: {holder} for more than {patience_s:.0f} s")
            time.sleep(POLL_S)
        _take(file)
        yield file


def _try(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def try_hold(path: Path) -> str | None:
    """Hold `path` for the life of this process; None, or who holds it already."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a+")  # noqa: SIM115  (kept open on purpose)
    if not _try(file):
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
        return not _try(file)
