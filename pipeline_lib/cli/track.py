"""`track`: the figures of a Trainer's trainer_state.json as our JSONL, and in wandb, at the steps they belong to."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

from pipeline_lib.artifacts.files import write_bytes
from pipeline_lib.artifacts.progress import say
from pipeline_lib.config.errors import UserError

OURS = {"learning_rate": "lr", "eval_loss": "valid_loss"}
"""Names that our own logs give the Trainer's figures; all others stay."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("state", type=Path, help="a trainer_state.json")
    parser.add_argument("--out", type=Path, help="JSONL to write; default: metrics.jsonl beside the file")
    parser.add_argument("--wandb", choices=["off", "offline", "online"], default="off", help="also to wandb")
    parser.add_argument("--project", default="errata", help="wandb project (default: errata)")
    parser.add_argument("--name", help="name of the wandb run; default: the folder's")


def run(arguments: argparse.Namespace) -> int:
    """Write the JSONL, and the wandb run if asked for; the same file twice is one run."""
    lines = read_state(arguments.state)
    out = arguments.out or arguments.state.with_name("metrics.jsonl")
    write_bytes(out, "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines).encode())
    say(f"{len(lines)} steps from {arguments.state}: {out}")
    if arguments.wandb != "off":
        mark = hashlib.sha256(arguments.state.read_bytes()).hexdigest()[:16]
        name = arguments.name or arguments.state.resolve().parent.name
        _to_wandb(lines, arguments.wandb, arguments.project, name, mark, arguments.state.parent)
    return 0


def read_state(path: Path) -> list[dict[str, Any]]:
    """One object a step, ascending: `step` and every figure that the Trainer logged there, under our names.

    Figures of training, of evaluation and of the final summary that belong to one step are one object. What is no
    finite number is null.

    Raises:
        UserError: not a trainer_state.json, or a row without its step.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["log_history"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"not a trainer_state.json: {type(error).__name__}: {error}",
            where=str(path),
            allowed="JSON with a list log_history",
            fix="give the file that the transformers Trainer leaves in a checkpoint folder",
        ) from None
    steps: dict[int, dict[str, Any]] = {}
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise UserError("a row has no step", where=f"{path}: log_history[{number}]", value=row, fix="mend it")
        line = steps.setdefault(row["step"], {"step": row["step"]})
        for key, value in row.items():
            if key != "step" and isinstance(value, (int, float)) and not isinstance(value, bool):
                line[OURS.get(str(key), str(key))] = value if math.isfinite(value) else None
    return [steps[step] for step in sorted(steps)]


def _to_wandb(lines: list[dict[str, Any]], mode: str, project: str, name: str, mark: str, folder: Path) -> None:
    os.environ.setdefault("WANDB_SILENT", "true")
    if mode == "offline":  # else it reports on itself to its maker
        os.environ["WANDB_ERROR_REPORTING"] = "false"
    import wandb

    quiet = wandb.Settings(
        console="off", disable_git=True, save_code=False, x_disable_meta=True, x_disable_machine_info=True
    )
    given: dict[str, Any] = {"project": project, "name": name, "id": mark, "dir": str(folder), "mode": mode}
    with wandb.init(**given, resume="allow", settings=quiet) as tracked:
        for line in lines:
            tracked.log(
                {key: value for key, value in line.items() if key != "step" and value is not None}, step=line["step"]
            )
    say(f"wandb ({mode}): run {mark} of project {project}")
