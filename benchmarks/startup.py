"""Start-up of every stage: its imports, the adoption of a finished artifact, and a whole run on a tiny input.

    python -m benchmarks.startup [--rounds 5]

A tiny pipeline is run once through Snakemake. For each stage, in turn and `rounds` times as a process of its own:
`import_s` imports the stage's module, `adopt_s` gives the stage command on its finished artifact, which it verifies
and adopts, and `run_s` gives it after the artifact was taken away; that is start-up, imports of libraries included, and
next to no work. `python -c pass` stands in the first row. assets and publish need a network: only their import is
measured. Prints a table of medians and writes benchmarks/startup.json.
"""

from __future__ import annotations

import argparse
import copy
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.report import write
from pipeline_lib.config.stages import STAGES

if TYPE_CHECKING:
    from tests.workflow.clone import Clone


def tiny() -> dict[str, Any]:
    """A configuration whose report goes through every stage that needs no network."""
    from tests.workflow.clone import TINY

    config = copy.deepcopy(TINY)
    cells = [["plain-tiny", "bitflip-tiny"]]
    grid = {"rows": ["trained"], "columns": ["clean", "with flips"], "cells": cells}
    config["tables"] = {"all": {"task": "words", "metric": "byte_perplexity", **grid}}
    return config


def timed(clone: Clone, *arguments: str) -> float:
    """Wall seconds of `python ARGUMENTS` in the clone."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *arguments], cwd=clone.root, env=clone.environment(), capture_output=True, text=True
    )
    seconds = time.perf_counter() - start
    if done.returncode != 0:
        raise RuntimeError(f"{arguments}: exit code {done.returncode}\n{done.stderr[-3000:]}")
    return seconds


def measure(clone: Clone, rounds: int) -> list[dict[str, Any]]:
    """One row a stage, from `rounds` interleaved runs of each."""
    artifacts = {
        stage: found[0] for stage in STAGES if (found := sorted((clone.root / "results" / "store" / stage).glob("*")))
    }
    figures: dict[tuple[str, str], list[float]] = {}
    for _ in range(rounds):
        figures.setdefault(("python -c pass", "import_s"), []).append(timed(clone, "-c", "pass"))
        for stage in STAGES:
            imported = timed(clone, "-c", f"import pipeline_lib.stages.{stage}")
            figures.setdefault((stage, "import_s"), []).append(imported)
            if stage in artifacts:
                manifest = str((artifacts[stage] / "manifest.json").relative_to(clone.root))
                command = ("-m", "pipeline_lib", "stage", manifest, "--threads", "1")
                figures.setdefault((stage, "adopt_s"), []).append(timed(clone, *command))
                shutil.rmtree(artifacts[stage])
                figures.setdefault((stage, "run_s"), []).append(timed(clone, *command))
    heads = ("import_s", "adopt_s", "run_s")
    return [
        {"stage": name, **{head: _median(figures.get((name, head))) for head in heads}}
        for name in ("python -c pass", *STAGES)
    ]


def _median(values: list[float] | None) -> float | None:
    return None if values is None else round(statistics.median(values), 2)


def main() -> None:
    """Make the tiny pipeline, measure and report."""
    from tests.workflow.clone import Clone

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        clone = Clone.make(Path(folder) / "clone", tiny())
        clone.snakemake("results/report.html")
        rows = measure(clone, rounds)
    write("startup", {"settings": {"rounds": rounds}}, rows)


if __name__ == "__main__":
    main()
