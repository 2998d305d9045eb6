"""SIGKILL at every point of tests/faults/points.py and at random times; the same command then ends in the same digest.

    python -m studies.kills [--random 8] [--seed 0] [--only "POINT" ...]

A tiny pipeline is finished once. Each kill works on a copy of it from which the artifacts of some stages are removed:
Snakemake makes them again, its whole process group dies at the point (an exact call of an exact stage), and the same
command is given again. A random kill removes all artifacts and comes after a seeded share of the time that an
undisturbed run takes; every second one kills Snakemake alone and leaves its stage at work. `--only` runs some points
and no random kills, and writes nothing. Writes studies/kills.json and docs/studies/kills.md.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.report import table
from studies.report import machine, main, where

if TYPE_CHECKING:
    from tests.faults.points import Point
    from tests.workflow.clone import Clone

NAME = "kills"
Row = dict[str, Any]


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Kill everywhere; the study.

    Raises:
        SystemExit: a kill was not mended, or `--only` was given: nothing is written.
    """
    from tests.faults.points import POINTS
    from tests.workflow.clone import Clone
    from tests.workflow.conftest import CONFIG, TARGETS

    with tempfile.TemporaryDirectory() as name:
        finished = Clone.make(Path(name) / "finished", CONFIG)
        start = time.monotonic()
        finished.snakemake(*TARGETS)
        undisturbed = time.monotonic() - start
        digest = finished.digest(*TARGETS)
        points = [_mended(digest, at_point, finished, point, POINTS[point]) for point in given.only or POINTS]
        rng = random.Random(given.seed)
        shares = [round(rng.uniform(0.05, 0.95), 3) for _ in range(0 if given.only else given.random)]
        times = [
            _mended(digest, at_time, finished, f"random-{number}", share, undisturbed, number % 2 == 1)
            for number, share in enumerate(shares)
        ]
    failed = [row for row in (*points, *times) if "failure" in row]
    if failed or given.only:
        sys.exit(f"{len(failed)} kills were not mended" if failed else 0)
    return {
        "study": NAME,
        "settings": {"targets": list(TARGETS), "seed": given.seed},
        "note": "",
        "digest": digest,
        "undisturbed_s": round(undisturbed, 1),
        "points": points,
        "random": times,
        **machine(),
    }


def _mended(digest: str, kill: Callable[..., Row], *arguments: Any) -> Row:
    """One kill's row; a failure is told and noted, so that the others still run."""
    try:
        row = kill(*arguments)
        assert row["digest"] == digest, f"digest {row['digest']} instead of {digest}"
    except (AssertionError, subprocess.TimeoutExpired) as error:
        row = {"kill": arguments[1], "failure": str(error)}
    print(row, file=sys.stderr, flush=True)
    return row


def copy_of(finished: Clone, name: str) -> Clone:
    """A copy of the finished pipeline to kill in."""
    from tests.workflow.clone import Clone
    from tests.workflow.conftest import CONFIG

    clone = Clone.make(finished.root.with_name(name), CONFIG)
    clone.copy_results_from(finished)
    return clone


def at_point(finished: Clone, name: str, point: Point) -> Row:
    """Kill the process group at an exact point."""
    from tests.faults.kill import kill_and_repeat

    clone = copy_of(finished, "".join(c if c.isalnum() else "-" for c in name))
    place = {"event": point.event, "match": point.match, "nth": point.nth, "remade": list(point.remake)}
    return {"kill": name, **place, **kill_and_repeat(clone, point)}


def at_time(finished: Clone, name: str, share: float, undisturbed: float, alone: bool) -> Row:
    """Kill after a share of an undisturbed run: the process group, or Snakemake `alone`."""
    from tests.faults.kill import alive, forget
    from tests.faults.points import DATA
    from tests.workflow.conftest import TARGETS

    clone = copy_of(finished, name)
    forget(clone, DATA)
    process = clone.start(*TARGETS)
    try:
        process.communicate(timeout=share * undisturbed)
    except subprocess.TimeoutExpired:
        (os.kill if alone else os.killpg)(process.pid, signal.SIGKILL)
        process.wait()
    killed = process.returncode == -signal.SIGKILL  # else it was faster than the undisturbed run
    time.sleep(0.2)
    survivors = len(alive(clone.root))
    assert alone or not survivors, f"{survivors} processes survived the kill of their group"
    at_work = sorted({path.name.partition("--")[0] for path in (clone.root / "results" / "work").glob("*--*/")})
    start = time.monotonic()
    again = clone.snakemake(*TARGETS)
    return {
        "kill": name,
        "share": share,
        "killed": ("Snakemake alone" if alone else "the process group") if killed else "nothing: it had finished",
        "unfinished": at_work,
        "survivors": survivors,
        "seconds_to_mend": round(time.monotonic() - start, 1),
        "digest": clone.digest(*TARGETS),
        "waited": again.count("waiting"),
        "adopted": again.count("adopted"),
        "resumed": again.count("resum"),
    }


PAGE = """# Kills

A run of the pipeline is killed with SIGKILL, the same command is given again, and the digest of all results and
artifacts must be that of a run that nobody disturbed ({undisturbed_s} s in all). It was, after each of these {count}
kills. No process outlived its group.

## At exact points

The whole process group dies at a file operation of a stage: `event` is Python's audit event, `nth` counts those that
match (the patterns are in `tests/faults/points.py`). The stages that run again are made from nothing; those before them
are in place.

{points}

## At random times

The time is a share of an undisturbed run, drawn with seed {seed}. A stage that outlives Snakemake keeps its lock: the
next run waits for it and adopts its artifact.

{times}

{where} {note} The digest is `{digest}`.

`make study-kills` kills everything again; the tests repeat some of these kills.
"""


def derive(study: dict[str, Any]) -> dict[str, str]:
    """The study's page, from its JSON alone."""
    points = [{**row, "stages that run again": ", ".join(row["remade"])} for row in study["points"]]
    times = [{**row, "unfinished": ", ".join(row["unfinished"])} for row in study["random"]]
    page = PAGE.format(
        undisturbed_s=study["undisturbed_s"],
        count=len(points) + len(times),
        points=table(points, ["kill", "event", "nth", "stages that run again", "seconds_to_mend"]),
        times=table(times, ["kill", "share", "killed", "unfinished", "survivors", "seconds_to_mend"]),
        seed=study["settings"]["seed"],
        where=where(study),
        note=study["note"],
        digest=study["digest"],
    )
    return {"docs/studies/kills.md": page}


if __name__ == "__main__":
    main(
        NAME,
        __doc__ or "",
        run,
        derive,
        random={"type": int, "default": 8, "help": "kills at random times"},
        seed={"type": int, "default": 0, "help": "of the random times"},
        only={"nargs": "+", "metavar": "POINT", "help": "points to try; nothing is written"},
    )
