"""Parts of the planning benchmark that run inside a clone: `python -m benchmarks.planning_inside PART`.

resolve: seconds that our resolver takes. dag: the jobs of the target and their dependencies, as JSON.
finish: publish an artifact of a few bytes for every job, so that a rerun finds nothing to do.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from pipeline_lib.config.plan import Plan

TARGET = "results/sweeps/seeds.csv"


def resolve() -> None:
    """Print the seconds from config.yaml to a resolved DAG, imports apart."""
    start = time.perf_counter()
    Plan.load().view(TARGET)
    print(time.perf_counter() - start)


def dag() -> None:
    """Print {stage: {id: [manifests it waits for]}} and the last manifest as `target`."""
    plan = Plan.load()
    last, _ = plan.view(TARGET)
    found: dict[str, dict[str, list[str]]] = {}
    for node in plan.nodes.values():
        found.setdefault(node.stage, {})[node.id] = [f"{up.path}/manifest.json" for up in node.inputs.values()]
    print(json.dumps({"stages": found, "target": f"{last.path}/manifest.json"}))


def finish() -> None:
    """Seal an artifact for every job and copy the readable result."""
    from pipeline_lib.artifacts import store, views
    from pipeline_lib.config.nodes import spec_path
    from pipeline_lib.stages.wiring import freeze

    plan = Plan.load()
    last, file = plan.view(TARGET)
    for node in plan.nodes.values():
        freeze(node)
        out = store.WORK / "out"
        out.mkdir(parents=True)
        (out / file).write_text(node.id)
        store.publish(out, Path(node.path), node.spec())
    assert views.copy_view(Path(last.path) / file, Path(TARGET), spec_path(last.stage, last.id))


if __name__ == "__main__":
    {"resolve": resolve, "dag": dag, "finish": finish}[sys.argv[1]]()
