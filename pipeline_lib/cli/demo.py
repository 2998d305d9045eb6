"""`demo`: the 2×2 table of `make demo`, and where everything lies."""

from __future__ import annotations

import argparse
from pathlib import Path

from pipeline_lib.artifacts.store import RESULTS
from pipeline_lib.artifacts.views import source
from pipeline_lib.config.errors import UserError
from pipeline_lib.config.plan import Plan
from pipeline_lib.reporting.learned import learned

FILES = {
    "results": "*-nano*/*.json",
    "tables": "tables/*",
    "report": "report.html",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No arguments."""


def run(arguments: argparse.Namespace) -> int:
    """Print the table and the paths."""
    table = RESULTS / "tables" / "robustness.md"
    if not table.exists():
        raise UserError("not made yet", where=str(table), fix="run `make demo`")
    print(f"\n{table.read_text()}")
    plan = Plan.load(arguments.config)
    for name in ("plain-nano", "bitflip-nano"):
        node, _ = plan.view(f"results/{name}/pydocs.json")
        train = plan.resolver.train(plan.resolver.experiments.get(name))
        tokens = train.inputs["tokens"]
        paths = [Path(one.path) for one in (node, train, tokens, tokens.inputs["dataset"])]
        it = learned(*paths)
        print(
            f"{name}: token perplexity {it.initial:.0f} untrained, {it.final:.1f} trained (test split); "
            f"a unigram model has {it.unigram:.0f}"
        )
    for name, pattern in FILES.items():
        for path in sorted(RESULTS.glob(pattern)):
            print(f"{name:8} {path}")
    origin = source(RESULTS / "report.html")
    if origin is not None:
        for path in sorted(Path(origin).parent.glob("plots/*")):
            print(f"{'plot':8} {path}")
    return 0
