"""A 25-point sweep over flip probabilities: our sweep stage, in one process, against 25 separate evaluations.

    python -m benchmarks.sweep [--limits 1 4] [--points 5] [--steps 20] [--rounds 1] [--threads 2]

`nano` of config.yaml is trained for a few steps through Snakemake. Then, for each number of documents, the cells of a
grid of weight and input probabilities (one fault seed each) are evaluated by the stage `sweep`, and again by one
`python -m pipeline_lib stage` after the other, as one job a cell would. Both must leave the same bytes. A short
evaluation is mostly start-up, which is what one process saves; `evaluation_s` is what a way spends on the evaluations
themselves. Prints a table and writes benchmarks/sweep.json. The goal is a ratio of at most 0.3.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.report import write
from pipeline_lib.artifacts.digest import digest
from pipeline_lib.artifacts.files import read_json
from pipeline_lib.config.load import read_yaml
from pipeline_lib.config.plan import Plan
from pipeline_lib.stages.wiring import freeze

if TYPE_CHECKING:
    from tests.workflow.clone import Clone

ROOT = Path(__file__).resolve().parents[1]


def task_name(limit: int) -> str:
    """Of the task that evaluates `limit` documents."""
    return f"pydocs-{limit}"


def config(steps: int, points: int, limits: list[int], threads: int) -> dict[str, Any]:
    """`nano` trained for `steps` steps, and one sweep of points × points cells for each limit."""
    full = read_yaml(ROOT / "config.yaml")
    model = full["models"]["nano"]
    model["recipe"]["pretrain"]["steps"] = steps
    model["run"] = {**model["run"], "threads": threads}
    grid = {
        f"transform.bitflip.{operand}.p": [2.0**-n for n in range(14, 14 + points)] for operand in ("weight", "input")
    }
    names = {limit: task_name(limit) for limit in limits}
    return {
        "tokenizers": {"pydocs": full["tokenizers"]["pydocs"]},
        "datasets": {"pydocs": full["datasets"]["pydocs"]},
        "models": {"nano": {**model, "tasks": list(names.values())}},
        "transforms": {name: full["transforms"][name] for name in ("plain", "bitflip")},
        "tasks": {name: {**full["tasks"]["pydocs"], "limit": limit} for limit, name in names.items()},
        "experiments": {"plain-nano": None, "flipped": {"from": "plain-nano", "transform": "bitflip"}},
        "sweeps": {name: {"experiment": "flipped", "task": name, "grid": grid} for name in names.values()},
        "fault_seeds": 1,
        "tracking": {"wandb": "off"},
    }


def stage(clone: Clone, name: str, node_id: str, threads: int) -> float:
    """Wall seconds of one stage, as Snakemake's rules run it."""
    manifest = f"results/store/{name}/{node_id}/manifest.json"
    command = ["-m", "pipeline_lib", "stage", manifest, "--threads", str(threads)]
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *command],
        cwd=clone.root,
        env=clone.environment({"OMP_NUM_THREADS": str(threads)}),
        capture_output=True,
        text=True,
    )
    seconds = time.perf_counter() - start
    if done.returncode != 0:
        raise RuntimeError(f"{command}: exit code {done.returncode}\n{done.stderr[-3000:]}")
    return seconds


def measure(clone: Clone, limit: int, rounds: int, threads: int) -> dict[str, Any]:
    """One row: both ways to evaluate the cells of a sweep, in turn."""
    with contextlib.chdir(clone.root):
        plan = Plan.load()
        sweep, _ = plan.view(f"results/sweeps/{task_name(limit)}.csv")
        for node in plan.nodes.values():
            freeze(node)
    cells = {cell.id: clone.root / cell.path for cell in sweep.inputs.values()}

    def forget() -> None:
        for path in (clone.root / sweep.path, *cells.values()):
            shutil.rmtree(path, ignore_errors=True)

    together, apart, digests = [], [], set()
    for _ in range(rounds):
        forget()
        together.append(stage(clone, "sweep", sweep.id, threads))
        digests.add(digest(cells.values()))
        forget()
        apart.append(sum(stage(clone, "evaluate", cell, threads) for cell in cells))
        digests.add(digest(cells.values()))
    assert len(digests) == 1, "the two ways must leave the same results"
    runs = [read_json(path / "result.json")["provenance"]["seconds"].values() for path in cells.values()]
    return {
        "points": len(cells),
        "documents": limit,
        "sweep_s": round(statistics.median(together), 1),
        "separate_s": round(statistics.median(apart), 1),
        "ratio": round(statistics.median(one / two for one, two in zip(together, apart, strict=True)), 3),
        "evaluation_s": round(sum(map(sum, runs)), 1),
    }


def main() -> None:
    """Train, measure, report."""
    from tests.workflow.clone import Clone

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limits", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--points", type=int, default=5, help="values an axis")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        clone = Clone.make(Path(folder) / "clone", config(given.steps, given.points, given.limits, given.threads))
        clone.snakemake(f"results/plain-nano/{task_name(given.limits[0])}.json")
        rows = [measure(clone, limit, given.rounds, given.threads) for limit in given.limits]
    write("sweep", {"settings": vars(given)}, rows)


if __name__ == "__main__":
    main()
