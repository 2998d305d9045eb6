"""Faults of a cluster, one after the other, in one pipeline; it ends in the digest of a run that nobody disturbed.

    python -m studies.chaos [--faults 33] [--seed 0]

A real Slurm is brought up on this machine (root). `nano` is trained clean, converted and evaluated through
`--profile slurm`, in slots of two minutes, while its training meets one fault after the other: every kind of
tests/cluster/faults.py about as often, in seeded order, each after a seeded number of steps. What follows is what a
user would see: Slurm requeues, Snakemake submits again, or nobody notices. Only the delay of two minutes that Slurm
imposes on requeued jobs is lifted. Writes studies/chaos.json and docs/studies/chaos.md.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.report import table
from pipeline_lib.config.load import read_yaml
from studies.report import ROOT, machine, main, where

if TYPE_CHECKING:
    from tests.cluster.run import Run

NAME = "chaos"
TARGET = "results/plain-nano/pydocs.json"
EVERY = 25
"""Steps between checkpoints: as many may be lost, and no more."""
AWAY = 10
"""Steps beyond the fault after which the training counts as going on."""
MEANWHILE = 120
"""Steps that the training may do during a fault that does not stop it."""


def config(steps: int) -> dict[str, Any]:
    """The demo's clean half, with small batches and many checkpoints."""
    full = read_yaml(ROOT / "config.yaml")
    model = full["models"]["nano"]
    model["recipe"]["pretrain"].update(steps=steps, global_batch=4)
    model["run"].update(checkpoint_every=EVERY, log_every=1, threads=2, runtime_min=2, mem_mb=2000, eval_mem_mb=3000)
    kept = {name: full[name] for name in ("tokenizers", "datasets", "models", "transforms", "tasks")}
    kept["models"], kept["datasets"] = {"nano": model}, {"pydocs": full["datasets"]["pydocs"]}
    kept["tokenizers"], kept["tasks"] = {"pydocs": full["tokenizers"]["pydocs"]}, {"pydocs": full["tasks"]["pydocs"]}
    return {**kept, "experiments": {"plain-nano": None}, "tracking": {"wandb": "off"}}


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Bring Slurm up, disturb, compare.

    Raises:
        AssertionError: the digests differ, or a training did not go on.
    """
    from tests.cluster.faults import FAULTS
    from tests.cluster.minislurm import MiniSlurm
    from tests.cluster.run import Run
    from tests.workflow.clone import Clone

    rng = random.Random(given.seed)
    kinds = [list(FAULTS)[number % len(FAULTS)] for number in range(given.faults)]
    rng.shuffle(kinds)
    gaps = [rng.randint(EVERY, 2 * EVERY) for _ in kinds]
    settings = config(steps=sum(gaps) + (AWAY + MEANWHILE) * len(kinds))
    with tempfile.TemporaryDirectory() as name:
        undisturbed = Clone.make(Path(name) / "undisturbed", settings)
        start = time.monotonic()
        undisturbed.snakemake(TARGET, seconds=1800)
        alone = time.monotonic() - start
        slurm = MiniSlurm(Path(name) / "slurm", cpu_nodes=3)
        try:
            slurm.up()
            disturbed = Run(slurm, Path(name) / "disturbed", "cpu", settings)
            start = time.monotonic()
            disturbed.start("--retries", str(len(kinds)), "--", TARGET)  # each fault may cost one
            rows = [_disturb(disturbed, kind, gap) for kind, gap in zip(kinds, gaps, strict=True)]
            disturbed.finish(1200)
            seconds = time.monotonic() - start
            digests = [clone.digest(TARGET) for clone in (undisturbed, disturbed.clone)]
            jobs = disturbed.jobs_submitted()
        finally:
            slurm.down()
    assert digests[0] == digests[1], f"{digests}"
    return {
        "study": NAME,
        "settings": {"target": TARGET, "seed": given.seed, "checkpoint_every": EVERY, "config": settings},
        "digest": digests[0],
        "undisturbed_s": round(alone),
        "disturbed_s": round(seconds),
        "jobs": len(jobs),
        "faults": rows,
        **machine(),
    }


def _disturb(run: Run, kind: str, gap: int) -> dict[str, Any]:
    """One fault: its row, once the training is beyond the step it was met at."""
    from tests.cluster.faults import FAULTS

    run.hold(run.step() + gap)
    at, resumed, job = run.step(), len(run.resumed_from()), run.job()
    start = time.monotonic()
    FAULTS[kind](run)
    highest = _until(run, run.step() + AWAY, resumed)  # beyond the last step before the fault took hold
    cost = time.monotonic() - start
    new = run.resumed_from()[resumed:]
    outcome = "the training went on undisturbed"
    if new:
        outcome = "requeued under its own number" if run.job() == job else "submitted again"
    row = {
        "fault": kind,
        "step": at,
        "outcome": outcome,
        "resumed_at": new[0] if new else None,
        "steps_lost": max(highest - new[0], 0) if new else 0,
        "seconds": round(cost),
    }
    print(row, file=sys.stderr, flush=True)
    return row


def _until(run: Run, step: int, resumed: int | None = None) -> int:
    """Wait for a step; the highest step that was seen before the training resumed (if it did)."""
    highest, end = 0, time.monotonic() + 600
    while run.step() < step:
        assert time.monotonic() < end, f"the training did not go on\n{run.said()[-3000:]}"
        assert not run.process_ended(), f"Snakemake ended\n{run.said()[-3000:]}"
        if resumed is None or len(run.resumed_from()) == resumed:
            highest = max(highest, run.step())
        run.slurm.start_now()
        time.sleep(0.3)
    return highest


PAGE = """# Chaos

One training (the demo's clean half, with checkpoints every {every} steps and two-minute slots) met {count} faults of a
real Slurm cluster, one after the other, in seeded order. The pipeline ended in the same digest as the same pipeline
that nobody disturbed: {disturbed_s} s instead of {undisturbed_s} s, in {jobs} Slurm jobs; {resumed} of the faults were
followed by a resumption from a checkpoint. No fault cost more than {worst} steps.

{faults}

`steps_lost` counts steps that were done and had to be done again; `seconds` is the time from the fault until the
training was {away} steps beyond it. It holds what the executor takes to notice (it asks less and less often, at most
every 180 s), the start of two nested Snakemakes and of torch, but not the two minutes that Slurm makes a requeued job
wait, which the study lifts. {where} The digest is `{digest}`.

A job that is preempted for good (`PreemptMode=CANCEL`) requeues itself; where an earlier kill of Snakemake left another
job waiting for its end, that one takes over ("submitted again").

`make chaos` makes the study again; the cluster tests repeat each kind of fault.
"""


def derive(study: dict[str, Any]) -> dict[str, str]:
    """The study's page, from its JSON alone."""
    page = PAGE.format(
        every=study["settings"]["checkpoint_every"],
        count=len(study["faults"]),
        worst=max(row["steps_lost"] for row in study["faults"]),
        resumed=sum(row["resumed_at"] is not None for row in study["faults"]),
        faults=table(study["faults"], ["fault", "step", "outcome", "resumed_at", "steps_lost", "seconds"]),
        away=AWAY,
        where=where(study),
        **{key: study[key] for key in ("disturbed_s", "undisturbed_s", "jobs", "digest")},
    )
    return {"docs/studies/chaos.md": page}


if __name__ == "__main__":
    main(
        NAME,
        __doc__ or "",
        run,
        derive,
        faults={"type": int, "default": 33, "help": "how many; each kind comes three times"},
        seed={"type": int, "default": 0, "help": "of their order and times"},
    )
