"""`digest`: the same number for the same results, wherever and however often interrupted they were made."""

from __future__ import annotations

import argparse
from pathlib import Path

from pipeline_lib.artifacts.digest import compared_files, digest
from pipeline_lib.artifacts.store import STORE
from pipeline_lib.config.errors import UserError
from pipeline_lib.config.plan import Plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("targets", nargs="*", help="readable results; default: everything in the store")
    parser.add_argument("--files", action="store_true", help="also print one line a file")


def run(arguments: argparse.Namespace) -> int:
    """Print the digest of the targets and all artifacts behind them."""
    artifacts = sorted(STORE.glob("*/*"))
    if arguments.targets:
        plan = Plan.load(arguments.config)
        for target in arguments.targets:
            plan.view(target)
        artifacts = sorted(Path(path) for path in plan.nodes)
        missing = [str(path) for path in artifacts if not (path / ".manifest.json").exists()]
        if missing:
            raise UserError("not made yet", where="digest", value=missing[0], fix="run snakemake on the targets first")
    if arguments.files:
        for artifact in artifacts:
            for name, value in compared_files(artifact).items():
                print(f"{value}  {artifact}/{name}")
    print(digest(artifacts))
    return 0
