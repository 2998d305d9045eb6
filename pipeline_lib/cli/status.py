"""`status`: results that are not what config.yaml and the code of today would make."""

from __future__ import annotations

import argparse
from pathlib import Path

from pipeline_lib.artifacts.files import read_json
from pipeline_lib.artifacts.store import RESULTS, STORE, WORK, Damaged, read_seal, requested
from pipeline_lib.artifacts.views import is_fresh, source
from pipeline_lib.config.errors import UserError
from pipeline_lib.config.plan import Plan
from pipeline_lib.config.stages import STAGES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No arguments."""


def run(arguments: argparse.Namespace) -> int:
    """Print one line a finding; exit code 0 also when there are some."""
    findings = [*_results(Plan.load(arguments.config)), *_old_code(), *_damaged(), *_unfinished()]
    print("\n".join(findings) if findings else "all results are fresh and made by the code of today")
    return 0


def _results(plan: Plan) -> list[str]:
    found = []
    for marker in sorted((RESULTS / ".views").glob("*.json")):
        view = RESULTS / marker.name.removesuffix(".json").replace("--", "/")
        try:
            node, file = plan.view(str(view))
        except UserError:
            found.append(f"orphan    {view}: config.yaml no longer holds it (made from {source(view)})")
            continue
        if not is_fresh(view, Path(node.path) / file):
            found.append(f"stale     {view}: made from {source(view)}, today it would be {node.path}")
    return found


def _old_code() -> list[str]:
    found = []
    for artifact in sorted(STORE.glob("*/*")):
        try:
            spec = read_seal(artifact)["spec"]
        except Damaged as error:
            found.append(f"damaged   {artifact}: {error}")
            continue
        today = STAGES[spec["stage"]].version if spec["stage"] in STAGES else None
        if today != spec["version"]:
            found.append(f"old code  {artifact}: stage version {spec['version']}, today {today}")
    return found


def _damaged() -> list[str]:
    return [f"damaged   {read_json(path)['why']}" for path in requested()]


def _unfinished() -> list[str]:
    return [f"unfinished {path}" for path in sorted(WORK.glob("*--*")) if path.is_dir()]
