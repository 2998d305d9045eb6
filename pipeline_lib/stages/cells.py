"""Sweep points that share a checkpoint: evaluated in one process, published one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline_lib.artifacts.files import read_json
from pipeline_lib.artifacts.progress import Progress
from pipeline_lib.artifacts.store import MANIFEST, STORE
from pipeline_lib.config.nodes import spec_path
from pipeline_lib.stages import runner


def make_missing_cells(spec: dict[str, Any], threads: int | None) -> int:
    """Evaluate the cells of a sweep that are not in the store yet; returns the first exit code that is not 0.

    Each is published when it is done, so a sweep that is killed half-way goes on from there. The evaluation
    keeps the checkpoint of the last cell in memory; cells are taken checkpoint by checkpoint, first the clean one that
    others are compared with.
    """
    ids = dict.fromkeys(entry["id"] for entry in spec["inputs"].values() if entry["stage"] == "evaluate")
    missing = [node_id for node_id in ids if not (STORE / "evaluate" / node_id / MANIFEST).exists()]
    with Progress("sweep", len(ids), "cells", done=len(ids) - len(missing)) as progress:
        for node_id in sorted(missing, key=_order):
            code = runner.run_stage(Path(STORE / "evaluate" / node_id / MANIFEST), threads)
            if code:
                return code
            progress.update()
    return 0


def _order(node_id: str) -> tuple[str, bool]:
    inputs = read_json(spec_path("evaluate", node_id))["inputs"]
    return inputs["checkpoint"]["id"], "clean" in inputs
