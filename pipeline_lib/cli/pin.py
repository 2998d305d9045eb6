"""`pin`: write hub.lock.json, the commits that the hub ids in config.yaml stand for."""

from __future__ import annotations

import argparse
from pathlib import Path

from pipeline_lib.config.load import load_config
from pipeline_lib.config.pins import LOCK_FILE
from pipeline_lib.config.registry import TASK_TYPES
from pipeline_lib.config.schema import Config
from pipeline_lib.config.validate import validate
from pipeline_lib.data.pins import pin


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No arguments."""


def run(arguments: argparse.Namespace) -> int:
    """Ask the hub for each id's commit; needs a network (HF_TOKEN for gated repositories)."""
    entries = hub_ids(load_config(Path(arguments.config)))
    for key, commit in sorted(pin(entries).items()):
        print(f"{commit}  {key}")
    print(f"wrote {LOCK_FILE}: {len(entries)} ids" if entries else "config.yaml names no hub id")
    return 0


def hub_ids(config: Config) -> list[tuple[str, str, str]]:
    """(kind, repository, branch) of everything that config.yaml takes from the hub."""
    found = [("model", entry.hub, entry.revision) for entry in config.tokenizers.values() if entry.hub]
    found += [("model", entry.hub.repo, entry.hub.revision) for entry in config.models.values() if entry.hub]
    for entry in config.datasets.values():
        if entry.source.get("type") == "hub":
            found.append(("dataset", entry.source["repo"], entry.source.get("revision", "main")))
    for name, given in config.tasks.items():
        where = f"config.yaml: tasks.{name}"
        module = TASK_TYPES.load(given.get("type", ""), f"{where}.type")
        for need in module.needs(validate(module.Settings, given, where)):
            found.append((need.get("repo_type", "dataset"), need["repo"], need.get("revision", "main")))
    return sorted(set(found))
