"""Run one stage in a process that kills itself: python -m tests.data.stage_process job.json N

SIGKILL comes at the N-th durable step (an fsync, a rename, a hard link), before it when N is even and
after it when N is odd. N = 0: never; the number of steps is then printed.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline_lib.artifacts.job import Job
from pipeline_lib.data import pack, parquet
from tests.data.jobs import STAGES

steps = 0


def dying(function: Callable[..., Any], at: int) -> Callable[..., Any]:
    """`function`, with the kill at its turn."""

    def step(*args: Any, **kwargs: Any) -> Any:
        global steps
        steps += 1
        if steps == at and at % 2 == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        value = function(*args, **kwargs)
        if steps == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return value

    return step


def main() -> None:
    """Run it; small shards and row groups, so that there are many steps."""
    job, at = Job.load(Path(sys.argv[1])), int(sys.argv[2])
    pack.SHARD_TOKENS, parquet.ROW_GROUP_BYTES = 2000, 3000
    for name in ("fsync", "replace", "link"):
        setattr(os, name, dying(getattr(os, name), at))
    STAGES[job.stage].run(job)
    print(steps)


if __name__ == "__main__":
    main()
