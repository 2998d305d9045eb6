"""Kill at a point, prove that nothing survived, give the same command again, compare digests."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.faults.points import Point
from tests.workflow.clone import Clone
from tests.workflow.conftest import TARGETS

HOOK = Path(__file__).resolve().parent / "hook"


def alive(root: Path, program: bytes = b"pipeline_lib") -> list[int]:
    """Processes that still work in a clone and have `program` in their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if os.readlink(entry / "cwd") == str(root) and program in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def forget(clone: Clone, stages: tuple[str, ...]) -> None:
    """Delete the artifacts of stages, so that they are made again; readable results go with them."""
    for stage in stages:
        shutil.rmtree(clone.root / "results" / "store" / stage, ignore_errors=True)
    for target in TARGETS:
        (clone.root / target).unlink(missing_ok=True)


def kill_and_repeat(clone: Clone, point: Point, targets: Sequence[str] = TARGETS) -> dict[str, Any]:
    """One round; the figures of it.

    Raises:
        AssertionError: the point was never reached, a process survived, or the same command did not mend it.
    """
    forget(clone, point.remake)
    counter = clone.root / "kill-counter"
    plan = {"event": point.event, "match": point.match, "nth": point.nth, "counter": str(counter)}
    process = clone.start(*targets, extra={"ERRATA_TEST_KILL": json.dumps(plan), "PYTHONPATH": str(HOOK)})
    try:
        output, _ = process.communicate(timeout=400)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == -signal.SIGKILL, f"never killed at {point}\n{output[-4000:]}"
    time.sleep(0.2)
    orphans = alive(clone.root)
    assert not orphans, f"processes survived the kill: {orphans}"
    start = time.monotonic()
    again = clone.snakemake(*targets)
    return {
        "seconds_to_mend": round(time.monotonic() - start, 1),
        "digest": clone.digest(*targets),
        "adopted": again.count("adopted"),
        "resumed": again.count("resum"),
    }
