"""Planning time: ours against bare Snakemake on the same DAG, and a rerun with nothing to do.

    python -m benchmarks.planning [--sizes 10 100 1000] [--rounds 3]

For each number of distinct trainings (a sweep over seeds; three jobs each) it times, in turn: `snakemake -n` on our
Snakefile, `snakemake -n` on a Snakefile of the same rules, commands, jobs and dependencies with constants for resources
and nothing else, and our resolver alone; then, with every artifact in place, `snakemake` itself on both. Our first plan
stands apart. Prints a table and writes benchmarks/planning.json. The goals: the resolver takes under 1 s, and ours at
most 1 s more than bare Snakemake.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.planning_inside import TARGET
from benchmarks.report import write

BARE = """
import json
JOBS = json.load(open("dag.json"))
wildcard_constraints: id="[a-z0-9._+-]+-[0-9a-f]{{12}}"
rule sweep_result:
    default_target: True
    input: JOBS["target"]
    output: "{target}"
    shell: "true"
{rules}
"""
RULE = """
rule {stage}:
    input: lambda w: JOBS["stages"]["{stage}"][w.id]
    output: "results/store/{stage}/{{id}}/manifest.json"
    log: "results/logs/{stage}/{{id}}.log"
    resources: gpu=0, mem_mb=4000, runtime=60
    shell: "python -m pipeline_lib stage {{output}} --threads {{threads}} 2> >(tee -a {{log}} >&2)"
"""
SNAKEMAKE = (sys.executable, "-m", "snakemake", "--cores", "1", TARGET)


def config(trainings: int) -> dict[str, Any]:
    """A sweep over seeds of the tiny model."""
    from tests.workflow.clone import TINY

    sweep = {"experiment": "plain-tiny", "task": "words", "grid": {"seed": list(range(trainings))}}
    return {**TINY, "sweeps": {"seeds": sweep}}


def run(command: tuple[str, ...], folder: Path) -> tuple[float, subprocess.CompletedProcess[str]]:
    """A command that must succeed, and its wall seconds."""
    start = time.perf_counter()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    seconds = time.perf_counter() - start
    if done.returncode != 0:
        raise RuntimeError(f"{command} in {folder}:\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
    return seconds, done


def inside(part: str, folder: Path) -> str:
    """A part of the benchmark that runs on our code in the clone."""
    return run((sys.executable, "-m", "benchmarks.planning_inside", part), folder)[1].stdout


def make_bare(clone: Path, folder: Path) -> None:
    """The same DAG for Snakemake alone, its jobs looked up in a dict."""
    folder.mkdir()
    text = inside("dag", clone)
    (folder / "dag.json").write_text(text)
    stages = json.loads(text)["stages"]
    rules = "".join(RULE.format(stage=stage) for stage in stages)
    (folder / "Snakefile").write_text(BARE.format(target=TARGET, rules=rules))


def finish_bare(folder: Path) -> None:
    """Make every output of the bare Snakefile, inputs first."""
    dag = json.loads((folder / "dag.json").read_text())
    for stage in reversed(dag["stages"]):
        for name in dag["stages"][stage]:
            path = folder / "results" / "store" / stage / name / "manifest.json"
            path.parent.mkdir(parents=True)
            path.touch()
    (folder / TARGET).parent.mkdir(parents=True)
    (folder / TARGET).touch()
    now = time.time()
    for path in (folder / "results").rglob("*"):
        os.utime(path, (now, now))


def noop(folder: Path) -> float:
    """Seconds of a Snakemake that has nothing to do."""
    seconds, done = run(SNAKEMAKE, folder)
    assert "Nothing to be done" in done.stdout + done.stderr, done.stderr[-2000:]
    return seconds


def measure(trainings: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Interleaved runs; medians of each."""
    from tests.workflow.clone import Clone, jobs

    ours, bare = Clone.make(folder / "ours", config(trainings)).root, folder / "bare"
    make_bare(ours, bare)
    plan = (*SNAKEMAKE, "-n")
    planned: list[list[float]] = [[], [], []]
    first, done = run(plan, ours)
    listed = jobs(done.stdout + done.stderr)
    done = run(plan, bare)[1]
    assert jobs(done.stdout + done.stderr) == listed, "the two Snakefiles must have the same DAG"
    for _ in range(rounds):
        planned[0].append(run(plan, ours)[0])
        planned[1].append(run(plan, bare)[0])
        planned[2].append(float(inside("resolve", ours)))
    shutil.rmtree(ours / "results")
    inside("finish", ours)
    finish_bare(bare)
    idle = [(noop(ours), noop(bare)) for _ in range(rounds)]
    ours_s, bare_s, resolver_s = map(statistics.median, planned)
    idle_ours_s, idle_bare_s = map(statistics.median, zip(*idle, strict=True))
    return {
        "trainings": trainings,
        "jobs": sum(listed.values()),
        "resolver_s": round(resolver_s, 3),
        "first_plan_s": round(first, 2),
        "plan_s": round(ours_s, 2),
        "bare_plan_s": round(bare_s, 2),
        "plan_difference_s": round(ours_s - bare_s, 2),
        "noop_s": round(idle_ours_s, 2),
        "bare_noop_s": round(idle_bare_s, 2),
        "noop_difference_s": round(idle_ours_s - idle_bare_s, 2),
        "rounds": {
            "plan_s": _rounded(planned[0]),
            "bare_plan_s": _rounded(planned[1]),
            "noop_s": _rounded([one for one, _ in idle]),
            "bare_noop_s": _rounded([two for _, two in idle]),
        },
    }


def _rounded(values: list[float]) -> list[float]:
    return [round(value, 2) for value in values]


def main() -> None:
    """Measure every size and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    rows = []
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(size, arguments.rounds, Path(folder)))
            print(rows[-1], file=sys.stderr)
    shown = [{key: value for key, value in row.items() if key != "rounds"} for row in rows]
    write("planning", {"rounds": {row["trainings"]: row["rounds"] for row in rows}}, shown)


if __name__ == "__main__":
    main()
