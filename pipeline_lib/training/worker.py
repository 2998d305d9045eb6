"""One rank of a training: `python -m pipeline_lib.training.worker <job.json>`, started by the launcher.

Exit codes: 0 done, 75 stopped on request with its state saved, 2 a user's error, 1 anything else.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import traceback
from pathlib import Path

from pipeline_lib.artifacts.files import write_json
from pipeline_lib.artifacts.job import Job
from pipeline_lib.config.errors import Stopped, UserError
from pipeline_lib.training.signals import remember_sigterm

STOPPED_EXIT = 75
STOPPED_FILE = "stopped.json"
"""In the work dir: all ranks stopped on request (the launcher may hear only of a signal)."""
FAILURE_FILE = "failure.json"
"""In the work dir: the message of a worker's UserError."""
LAUNCHER_VARIABLE = "ERRATA_LAUNCHER"
"""Process id of the launcher on this node."""

_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


def die_with_parent() -> None:
    """Ask the kernel for SIGKILL when the launcher dies, so that no kill leaves an orphan that still writes."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    launcher = os.environ.get(LAUNCHER_VARIABLE)
    if launcher is not None and os.getppid() != int(launcher):
        os._exit(1)  # it died before the request was in force


def main(job_file: Path) -> int:
    """Train as one rank; the process's exit code."""
    die_with_parent()
    remember_sigterm()
    job = Job.load(job_file)
    first = os.environ.get("LOCAL_RANK", "0") == "0"  # on every node: rank 0's may not be the one that reads it
    from pipeline_lib.training import distributed
    from pipeline_lib.training.run import run_rank

    try:
        run_rank(job)
    except Stopped as stop:
        if first:
            write_json(job.work / STOPPED_FILE, {"message": str(stop)})
        distributed.barrier()  # a rank that has ended ends the others: on other nodes srun kills them at once
        distributed.stop()
        return STOPPED_EXIT
    except UserError as error:
        write_json(job.work / FAILURE_FILE, {"message": str(error)})
        return 2
    except BaseException:
        # The other ranks may hang in a collective; the launcher ends them when this one is gone.
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    distributed.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
