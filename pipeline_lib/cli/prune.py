"""`prune`: artifacts that no experiment refers to."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from pipeline_lib.artifacts.locks import try_hold
from pipeline_lib.artifacts.store import QUARANTINE, RESULTS, STORE, WORK, Damaged, read_seal
from pipeline_lib.artifacts.views import source
from pipeline_lib.config.errors import UserError
from pipeline_lib.config.plan import Plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--delete", action="store_true", help="delete them (without it they are only listed)")


def run(arguments: argparse.Namespace) -> int:
    """List or delete; what config.yaml lists, what readable results come from, and all behind those is kept."""
    plan = Plan.load(arguments.config)
    kept = _kept(plan)
    unused = [path for path in sorted(STORE.glob("*/*")) if path not in kept]
    unused += sorted(path for path in QUARANTINE.glob("*--*") if path.is_dir())
    if arguments.delete and try_hold(RESULTS / ".orchestrator.lock"):
        raise UserError("a snakemake works in this results/", where="prune --delete", fix="wait for it")
    total = 0
    for path in unused:
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        total += size
        print(f"{'deleted' if arguments.delete else 'unused'} {size / 1e6:10.1f} MB  {path}")
        if arguments.delete:
            shutil.rmtree(path)
            shutil.rmtree(WORK / f"{path.parent.name}--{path.name}", ignore_errors=True)
    hint = "" if arguments.delete or not unused else "; add --delete to delete them"
    print(f"{len(unused)} artifacts, {total / 1e6:.1f} MB{hint}")
    return 0


def _kept(plan: Plan) -> set[Path]:
    for target in plan.targets():
        plan.view(target)
    kept = {Path(path) for path in plan.nodes}
    todo = [origin.parent for view in RESULTS.glob("*/*") if (origin := source(view)) is not None]
    while todo:
        artifact = todo.pop()
        kept.add(artifact)
        try:
            upstream = read_seal(artifact)["spec"]["inputs"].values()
        except Damaged:
            continue
        todo += [path for entry in upstream if (path := STORE / entry["stage"] / entry["id"]) not in kept]
    return kept
