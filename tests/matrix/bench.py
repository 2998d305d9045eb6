"""The matrix at work: plans cells and runs their stages in a results directory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from pipeline_lib.config.nodes import Node
from pipeline_lib.config.plan import Plan
from pipeline_lib.stages import wiring
from pipeline_lib.stages.runner import OFFLINE
from tests.conftest import ROOT
from tests.matrix.cells import TASK, Cell, config
from tests.workflow.clone import write_words


class Bench:
    """A folder with a config.yaml of the cells, and a server that runs stages in it."""

    def __init__(self, root: Path, chosen: list[Cell], path: str = "") -> None:
        self.root = root
        for place in ("whole", "killed"):
            write_words(root / place / "data")
            (root / place / "config.yaml").write_text(yaml.safe_dump(config(chosen), sort_keys=False))
        temporary = root / "tmp"  # forked processes leave at once, and what they had there stays
        temporary.mkdir()
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.matrix.server"],
            cwd=ROOT,
            env={**os.environ, **OFFLINE, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "TMPDIR": str(temporary)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._done: set[str] = set()
        os.chdir(root / "whole")
        self.plan = Plan.load()

    def close(self) -> None:
        """End the server."""
        assert self._server.stdin is not None
        self._server.stdin.close()
        assert self._server.wait(30) == 0

    def ask(self, call: str, place: str = "whole", log: str = "log", **arguments: Any) -> int:
        """Have the server run something in one of the two results directories; its exit code."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        request = {"call": call, "cwd": str(self.root / place), "log": str(self.root / log), "arguments": arguments}
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def checkpoint(self, cell: Cell) -> Node:
        """The checkpoint that a cell is evaluated from."""
        return self.plan.resolver.checkpoint(self.plan.resolver.experiments.get(cell.name))

    def result(self, cell: Cell) -> Node:
        """The result of a cell."""
        return self.plan.resolver.result(self.plan.resolver.experiments.get(cell.name), TASK)

    def make(self, node: Node) -> Path:
        """Make an artifact and what it is made from, as Snakemake would; each once."""
        for upstream in node.inputs.values():
            self.make(upstream)
        if node.path not in self._done:
            os.chdir(self.root / "whole")
            wiring.freeze(node)
            self._run(node, "whole", None)
            self._done.add(node.path)
        return self.root / "whole" / node.path

    def kill_and_resume(self, node: Node, after_step: int) -> tuple[Path, list[int], list[int]]:
        """Train again elsewhere, killed after a checkpoint, then go on.

        Returns:
            The artifact, and the steps whose checkpoints were sealed before and after the kill.
        """
        whole, killed = self.root / "whole" / "results", self.root / "killed" / "results"
        for upstream in node.inputs.values():
            path = Path(upstream.path).relative_to("results")
            shutil.copytree(whole / path, killed / path, dirs_exist_ok=True)
        shutil.copytree(whole / "specs", killed / "specs", dirs_exist_ok=True)
        before = self._run(node, "killed", after_step)
        after = self._run(node, "killed", None)
        return self.root / "killed" / node.path, before, after

    def _run(self, node: Node, place: str, die_after_step: int | None) -> list[int]:
        """Run a stage; the steps whose checkpoints it sealed."""
        seals, log = self.root / "seals", f"{place}-{node.stage}-{node.id}.log"
        manifest = f"{node.path}/manifest.json"
        code = self.ask("stage", place, log, manifest=manifest, die_after_step=die_after_step, seals=str(seals))
        expected = 0 if die_after_step is None else -9
        assert code == expected, f"exit code {code}\n{(self.root / log).read_text()[-4000:]}"
        return [int(line) for line in seals.read_text().split()]
