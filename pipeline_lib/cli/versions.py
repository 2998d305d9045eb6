"""`versions`: does the code of each stage still mean what its version says?"""

from __future__ import annotations

import argparse
from pathlib import Path

from pipeline_lib.artifacts.files import read_json, write_json
from pipeline_lib.cli.codehash import code_hash
from pipeline_lib.config.errors import UserError
from pipeline_lib.config.stages import STAGES

LOCK = Path("stage_versions.lock")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument(
        "--same-meaning",
        metavar="WHY",
        help="the code moved, the results did not: write the new hashes with this reason",
    )
    parser.add_argument("--update", action="store_true", help="write the new hashes of stages whose version was raised")


def current() -> dict[str, dict[str, object]]:
    """{stage: {version, hash}} of the code as it stands."""
    return {
        name: {"version": stage.version, "hash": code_hash(f"pipeline_lib.stages.{name}")}
        for name, stage in STAGES.items()
    }


def moved(lock: dict[str, dict[str, object]], now: dict[str, dict[str, object]]) -> dict[str, str]:
    """{stage: what is wrong} for stages whose code and lock entry disagree."""
    found = {}
    for name, entry in now.items():
        before = lock.get(name)
        if before is None:
            found[name] = "new stage"
        elif before["version"] != entry["version"]:
            found[name] = f"version {before['version']} → {entry['version']}"
        elif before["hash"] != entry["hash"]:
            found[name] = "code moved, version did not"
    return found


def run(arguments: argparse.Namespace) -> int:
    """Compare, and write the lock when told to."""
    lock = read_json(LOCK) if LOCK.exists() else {}
    now = current()
    found = moved(lock, now)
    silent = [name for name, what in found.items() if what == "code moved, version did not"]
    for name, what in found.items():
        print(f"{name}: {what}")
    if arguments.same_meaning or (arguments.update and not silent):
        for name in found:
            entry = dict(now[name])
            if name in silent:
                entry["same-meaning"] = arguments.same_meaning
            lock[name] = entry
        write_json(LOCK, {name: lock[name] for name in now})
        return 0
    if silent:
        raise UserError(
            "the code of these stages moved, their versions did not",
            where=str(LOCK),
            value=silent,
            fix="raise the version in pipeline_lib/config/stages.py if results change and run `versions --update`, "
            "else run `versions --same-meaning 'why results are the same'`",
        )
    if found:
        raise UserError(
            "the lock is behind", where=str(LOCK), value=found, fix="run `python -m pipeline_lib versions --update`"
        )
    print("stage_versions.lock agrees with the code")
    return 0
