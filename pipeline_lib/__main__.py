"""`python -m pipeline_lib COMMAND`: what rules run, and what a user asks about results."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from types import ModuleType

from pipeline_lib.config.errors import Stopped, UserError

COMMANDS = {
    "plan": "for each stage of TARGETs: is it there, and if not, why it will run",
    "explain": "the chain of artifacts, settings and code behind a result, or how two results differ",
    "status": "results that are stale, made by older code, damaged or unfinished",
    "prune": "list (or --delete) artifacts that nothing in config.yaml refers to",
    "digest": "one SHA-256 over weights, tokens, records, CSV and results",
    "pin": "look up the commits of all hub ids in config.yaml and write hub.lock.json",
    "import-losses": "published per-example losses for rho-loss, from pickles that can do nothing",
    "track": "a Trainer's trainer_state.json as JSONL, and to wandb, at its true steps",
    "versions": "check stage_versions.lock against the code",
    "demo": "(used by make demo) the 2×2 table, and where everything lies",
    "stage": "(used by rules) make one artifact",
    "view": "(used by rules) copy a published file to its readable path",
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pipeline_lib", description=__doc__)
    parser.add_argument("--config", default="config.yaml", help="configuration file (default: config.yaml)")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        if name == "stage":
            command.add_argument("manifest", type=Path)
            command.add_argument("--threads", type=int, default=None)
        elif name == "view":
            command.add_argument("source", type=Path)
            command.add_argument("view", type=Path)
        else:
            _module(name).add_arguments(command)
    return parser


def _run(arguments: argparse.Namespace) -> int:
    if arguments.command == "stage":
        from pipeline_lib.stages.runner import run_stage

        return run_stage(arguments.manifest, arguments.threads)
    if arguments.command == "view":
        from pipeline_lib.artifacts.views import copy_view
        from pipeline_lib.config.nodes import spec_path

        artifact = arguments.source.parent
        return 0 if copy_view(arguments.source, arguments.view, spec_path(artifact.parent.name, artifact.name)) else 65
    return _module(arguments.command).run(arguments)


def _module(command: str) -> ModuleType:
    return importlib.import_module(f"pipeline_lib.cli.{command.replace('-', '_')}")


def main() -> int:
    """Run one command; a user's mistake is one message and exit code 2."""
    arguments = _parser().parse_args()
    try:
        return _run(arguments)
    except UserError as error:
        print(f"errata: {error}", file=sys.stderr)
        return 2
    except Stopped as stop:
        print(f"errata: {stop}", file=sys.stderr)
        return 75
    except BrokenPipeError:
        return 141


if __name__ == "__main__":
    sys.exit(main())
