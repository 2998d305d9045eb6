"""What became of the attempts at an artifact: noted in its work dir, read by the next attempt and by the user."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pipeline_lib.artifacts.files import read_json, write_json
from pipeline_lib.artifacts.locks import is_held
from pipeline_lib.artifacts.store import RESULTS, WORK
from pipeline_lib.stages import slurm

NOTE = "attempt.json"
RUNNING, STOPPED, FAILED, REFUSED = "running", "stopped", "failed", "refused"


@dataclass(frozen=True)
class Attempt:
    """The last attempt at an artifact.

    Attributes:
        started: Unix time, s.
        host: where.
        job: Slurm's number, or None.
        state: running; stopped (in good order), failed (an error of ours), refused (the user can mend it).
        message: of the error, its last line.
        killed: how many attempts before this one ended without a word.
    """

    started: float
    host: str
    job: str | None
    state: str = RUNNING
    message: str = ""
    killed: int = 0


def read(work: Path) -> Attempt | None:
    """The note in a work dir; None where there is none or it is torn."""
    try:
        return Attempt(**read_json(work / NOTE))
    except (OSError, ValueError, TypeError):
        return None


def begin(work: Path) -> Attempt:
    """Note that an attempt begins."""
    attempt = Attempt(time.time(), os.uname().nodename, slurm.job_id(), killed=killed(work, slurm.job_id()))
    write_json(work / NOTE, asdict(attempt))
    return attempt


def end(work: Path, attempt: Attempt, state: str, message: str = "") -> None:
    """Note how an attempt ended that published nothing."""
    write_json(work / NOTE, asdict(replace(attempt, state=state, message=message)))


def killed(work: Path, job: str | None = None) -> int:
    """How many attempts were killed from outside: most likely for want of memory.

    One that Slurm put back into the queue itself (a lost node, preemption) has the number of the job that asks, and
    does not count.
    """
    last = read(work)
    if last is None:
        return 0
    silent = last.state == RUNNING and last.job is not None and last.job != job
    return last.killed + silent


def failures(since: float) -> list[str]:
    """One paragraph for each artifact whose last attempt began after `since` (Unix time, s) and failed."""
    told = []
    for note in sorted(WORK.glob(f"*--*/{NOTE}")):
        attempt = read(note.parent)
        if attempt is None or attempt.started < since or is_held(note.parent.with_name(note.parent.name + ".lock")):
            continue
        stage, _, node_id = note.parent.name.partition("--")
        told.append(_tell(stage, node_id, attempt))
    return told


def has_begun(work: Path, since: float) -> bool:
    """Whether the last attempt in a work dir began after `since` (Unix time, s)."""
    attempt = read(work)
    return attempt is not None and attempt.started >= since


def never_begun(stage: str, node_id: str) -> str:
    """The paragraph for an artifact whose Slurm job never came to run its stage."""
    return "\n".join(
        [
            f"{stage} {node_id} was not begun: Slurm refused or cancelled its job, or the job ended before its stage",
            f"  log:     above, under 'Error in rule {stage}'; of jobs that started: {RESULTS / 'logs' / 'slurm'}",
            "  fix:     where Slurm refused it, compare its resources (run in config.yaml) with slurm/partitions.yaml, "
            "slurm/profile.yaml and `sinfo`; then give the same command",
        ]
    )


def _tell(stage: str, node_id: str, attempt: Attempt) -> str:
    ended, fix = {
        RUNNING: (
            "was killed without a word: out of memory, most likely",
            "give the same command; it goes on from its last checkpoint and, as a Slurm job, with more memory "
            "(the first try takes run.mem_mb or run.eval_mem_mb)",
        ),
        STOPPED: (
            "stopped in good order",
            "give the same command; it goes on from its saved state (should its time limit have ended it: raise "
            "run.runtime_min of a training, run.eval_runtime_min of other stages)",
        ),
        FAILED: ("failed", "see the log; when the cause is gone, give the same command"),
        REFUSED: ("was refused", "mend what the message names, then give the same command"),
    }[attempt.state]
    job = f" in Slurm job {attempt.job}" if attempt.job else ""
    lines = [f"{stage} {node_id} {ended}{job} on {attempt.host}"]
    lines += [f"  message: {attempt.message}"] if attempt.message else []
    lines += [f"  log:     {RESULTS / 'logs' / stage / node_id}.log", f"  fix:     {fix}"]
    return "\n".join(lines)
