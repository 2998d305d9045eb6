"""`plan TARGET…`: what will run, and why."""

from __future__ import annotations

import argparse
from pathlib import Path

from pipeline_lib.artifacts.store import QUARANTINE, Damaged, read_seal, requested, work_directory
from pipeline_lib.artifacts.views import is_fresh
from pipeline_lib.cli.differences import changes, nearest, stored_specs
from pipeline_lib.config.nodes import Node
from pipeline_lib.config.pins import COMMIT
from pipeline_lib.config.plan import Plan
from pipeline_lib.config.stages import STAGES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("targets", nargs="*", help="readable results; default: all that config.yaml lists")


def run(arguments: argparse.Namespace) -> int:
    """Print one line a stage, upstream first."""
    plan = Plan.load(arguments.config)
    targets = arguments.targets or plan.targets()
    views = {target: plan.view(target) for target in targets}
    reported = {path.name.removesuffix(".json") for path in requested()}
    counts = {"present": 0, "to make": 0}
    for node in _ordered([node for node, _ in views.values()]):
        state, why = explain_state(node, reported)
        counts[state] += 1
        print(f"{state:8} {node.stage:10} {node.id}{f'  — {why}' if why else ''}")
    for target, (node, file) in views.items():
        fresh = is_fresh(Path(target), Path(node.path) / file)
        print(f"{'fresh' if fresh else 'renew':8} {'result':10} {target}")
    print(f"{counts['to make']} stages to make, {counts['present']} present")
    return 0


def explain_state(node: Node, reported: set[str]) -> tuple[str, str]:
    """(`present` or `to make`, why)."""
    artifact = Path(node.path)
    name = f"{node.stage}--{node.id}"
    if name in reported:
        return "to make", "a reader found it damaged; it will be set aside and remade"
    try:
        read_seal(artifact)
        return "present", ""
    except Damaged as error:
        if artifact.is_dir() and any(path.name != "manifest.json" for path in artifact.iterdir()):
            return "to make", f"rebuilt because {error}"
    if any(QUARANTINE.glob(f"{name}-*")):
        return "to make", "rebuilt because it was set aside as damaged"
    if work_directory(artifact).is_dir():
        return "to make", "unfinished: goes on from its work directory"
    return "to make", _why_new(node)


def _why_new(node: Node) -> str:
    revision = (node.settings.get("source", {}) if node.stage == "dataset" else node.settings).get("revision")
    unpinned = revision is not None and STAGES[node.stage].network and not COMMIT.fullmatch(revision)
    note = f"; {revision} will be pinned at download" if unpinned else ""
    other = nearest(node, stored_specs(node.stage))
    if other is None:
        return f"new{note}"
    found = changes(other, node.spec())
    listed = "; ".join(found[:4]) + (" …" if len(found) > 4 else "")
    return f"changed: {listed} (nearest: {other['label']}-{other['fingerprint'][:12]}){note}"


def _ordered(nodes: list[Node]) -> list[Node]:
    seen: dict[str, Node] = {}

    def visit(node: Node) -> None:
        if node.path not in seen:
            for upstream in node.inputs.values():
                visit(upstream)
            seen[node.path] = node

    for node in nodes:
        visit(node)
    return list(seen.values())
