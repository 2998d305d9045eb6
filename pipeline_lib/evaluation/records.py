"""What runs leave beside their metrics, on disk: a JSONL file a run, and readable files of several arms."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline_lib.artifacts.files import write_bytes
from pipeline_lib.config.registry import TASK_TYPES

FOLDER = "records"


def jsonl(records: Sequence[Mapping[str, Any]]) -> str:
    """One record a line."""
    return "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)


def write_records(folder: Path, records: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Write the records of each run to `folder`/records/<run>.jsonl."""
    for run, lines in records.items():
        write_bytes(folder / FOLDER / f"{run}.jsonl", jsonl(lines).encode())


def read_records(artifact: Path) -> dict[str, list[dict[str, Any]]]:
    """{run: its records} of an evaluate artifact, fault seeds by number."""
    paths = sorted((artifact / FOLDER).glob("*.jsonl"), key=lambda path: (len(path.stem), path.stem))
    return {
        path.stem: [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line] for path in paths
    }


def write_readable(folder: Path, stem: str, task: Mapping[str, Any], arms: Mapping[str, Path]) -> None:
    """Write the readable files of a task whose runs leave records: `folder`/<stem>.<ending>.

    Args:
        task: the task's settings, as they stand in a spec.
        arms: {arm: its evaluate artifact}.
    """
    module = TASK_TYPES.load(task["type"], "task.type")
    if not getattr(module, "READABLE", ()):
        return
    settings = module.Settings.model_validate(task)
    texts = module.readable(settings, {name: read_records(path) for name, path in arms.items()})
    for ending in module.READABLE:
        write_bytes(folder / f"{stem}.{ending}", texts[ending].encode())
