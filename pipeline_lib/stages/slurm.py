"""What Slurm is asked and told: time left, requeueing, jobs that an earlier run left behind."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from pipeline_lib.artifacts.progress import say

ENDED = {
    "CANCELLED",
    "COMPLETED",
    "FAILED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "BOOT_FAIL",
    "DEADLINE",
}
COMMENT = re.compile(r"rule_(?P<stage>[a-z]+)_wildcards_(?P<id>[a-z0-9._+-]+)")
"""How the executor plugin marks its jobs; `name_job` keeps that beginning."""
GROUP = re.compile(r"rule_(?P<group>[a-z]+)_(?P<stages>[a-z_]+)")
"""How it marks a job that runs a group of stages: the group's name, and its stages."""


def is_here() -> bool:
    """Whether this machine can submit to a Slurm, or belongs to one."""
    return shutil.which("sbatch") is not None


def job_id() -> str | None:
    """The surrounding Slurm job, or None."""
    return os.environ.get("SLURM_JOB_ID")


def ask(*command: str) -> str | None:
    """What a Slurm command prints, or None when it fails or does not answer."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def seconds_left() -> float | None:
    """Until Slurm ends this job: None outside Slurm and without a limit.

    Slurm's own count is taken, since a profile or an administrator may have set another limit than config.yaml.
    """
    job = job_id()
    if job is None:
        return None
    shown = ask("squeue", "--noheader", f"--jobs={job}", "--format=%L")
    if shown is None or not shown.strip():
        say(f"squeue does not say how long Slurm job {job} may run: it stops on SIGTERM only")
        return None
    return parse_duration(shown.split()[0])


def parse_duration(text: str) -> float | None:
    """Seconds of Slurm's `[days-]hours:minutes:seconds` or `minutes:seconds`; None for no limit."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if not match:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def name_job(experiment: str | None) -> None:
    """Add the experiment to the job's comment, which says rule and artifact already (`squeue -o '%i %k'`)."""
    job = job_id()
    if job is not None and experiment:
        comment = ask("squeue", "--noheader", f"--jobs={job}", "--format=%k")
        if comment and COMMENT.match(comment):
            beginning = comment.strip().partition(",")[0]
            ask("scontrol", "update", f"JobId={job}", f"Comment={beginning}, experiment {experiment}")


def requeue() -> None:
    """Put this job back into the queue under its own id, so that stopping in good order costs no retry.

    Not when it was cancelled: somebody wants it to end. Nor at its limit: a stage that cannot save would never end.
    """
    job = job_id()
    if job is None:
        return
    shown = ask("scontrol", "show", "job", job, "--oneliner") or ""
    state = re.search(r"\bJobState=(\w+)", shown)
    if state and state[1] == "PENDING":  # preempted: Slurm has put it back itself
        return
    # What Slurm ends reads COMPLETING, whatever the reason. One that it preempts and does not put back has this time:
    # it would end as PREEMPTED, for which the executor waits for ever.
    preempted = re.search(r"\bPreemptTime=\d", shown)
    if not (state and state[1] == "RUNNING") and not preempted:
        say(f"Slurm ends job {job} (cancelled, at its limit, or to put it back itself): not requeued from here")
        return
    done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60)
    if done.returncode:
        say(f"Slurm job {job} could not be requeued ({done.stderr.strip()}); Snakemake submits it again")
        return
    say(f"Slurm job {job} requeued; it goes on from its last checkpoint")


@dataclass(frozen=True)
class Orphan:
    """A job that an earlier orchestrator of this folder submitted and that has not ended.

    Attributes:
        job: Slurm's number.
        stages: what it runs: one stage, or those of a group.
        id: of the artifact; None for a group, whose comment names none.
        state: Slurm's.
    """

    job: str
    stages: frozenset[str]
    id: str | None
    state: str


def orphans(folder: Path) -> list[Orphan]:
    """Jobs of ours in `folder`.

    Raises:
        ConnectionError: Slurm does not answer.
    """
    shown = ask("squeue", "--me", "--noheader", "--format=%i|%T|%Z|%k")
    if shown is None:
        raise ConnectionError("squeue does not answer")
    found = []
    for line in shown.splitlines():
        job, state, workdir, comment = line.split("|", 3)
        if Path(workdir).resolve() != folder.resolve():
            continue
        if match := COMMENT.match(comment):
            found.append(Orphan(job, frozenset([match["stage"]]), match["id"], state))
        elif match := GROUP.fullmatch(comment):
            found.append(Orphan(job, frozenset(match["stages"].split("_")), None, state))
    return found


def is_alive(job: str) -> bool:
    """Whether a job waits or runs."""
    shown = ask("squeue", "--noheader", f"--jobs={job}", "--format=%T")  # fails when Slurm has forgotten the job
    return bool(shown and shown.strip() and shown.strip() not in ENDED)
