"""`explain RESULT [OTHER]`: where a result comes from, and how two differ."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pipeline_lib.artifacts.files import read_json
from pipeline_lib.artifacts.store import STORE, Damaged, verify
from pipeline_lib.artifacts.views import source
from pipeline_lib.cli.differences import changes, flatten
from pipeline_lib.config.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("result", type=Path, help="a readable result or an artifact's folder")
    parser.add_argument("other", type=Path, nargs="?", help="a second one to compare with")


def run(arguments: argparse.Namespace) -> int:
    """Print the chain of one result, or the differences of two."""
    chain = _chain(_artifact(arguments.result))
    if arguments.other is None:
        for depth, role, spec in chain:
            _show(depth, role, spec)
        return 0
    return _compare(chain, _chain(_artifact(arguments.other)))


def _artifact(path: Path) -> Path:
    origin = source(path) if path.suffix else None
    artifact = origin.parent if origin else path
    if not (artifact / ".manifest.json").exists():
        raise UserError(
            "no artifact stands behind it",
            where="explain",
            value=str(path),
            allowed="a file that snakemake made under results/, or results/store/<stage>/<id>",
            fix="make it first",
        )
    return artifact


def _chain(artifact: Path, role: str = "", depth: int = 0) -> list[tuple[int, str, dict[str, Any]]]:
    try:
        spec = verify(artifact)["spec"]
    except Damaged as error:
        raise UserError(
            f"damaged: {error}", where=str(artifact), fix="give the snakemake command again; it is remade"
        ) from None
    found = [(depth, role, spec)]
    for name, upstream in spec["inputs"].items():
        found += _chain(STORE / upstream["stage"] / upstream["id"], name, depth + 1)
    return found


def _show(depth: int, role: str, spec: dict[str, Any]) -> None:
    indent = "  " * depth
    artifact = STORE / spec["stage"] / f"{spec['label']}-{spec['fingerprint'][:12]}"
    record = artifact / "log" / "provenance.json"
    made = read_json(record) if record.exists() else {}
    when = (
        f"  {made.get('started', '')}, {made.get('wall_s', '?')} s, commit {made.get('commit', '?')[:12]}"
        if made
        else ""
    )
    print(f"{indent}{role + ': ' if role else ''}{artifact} (version {spec['version']}){when}")
    for key, value in flatten(spec["settings"]).items():
        print(f"{indent}    {key} = {value!r}")


def _compare(one: list[tuple[int, str, dict[str, Any]]], two: list[tuple[int, str, dict[str, Any]]]) -> int:
    """Lines for each artifact of one chain and its counterpart in the other, by stage and role."""
    others = {(spec["stage"], role, depth): spec for depth, role, spec in two}
    different = 0
    for depth, role, spec in one:
        other = others.get((spec["stage"], role, depth))
        if other is None:
            print(f"{spec['stage']} {role}: only in the first")
            different += 1
        elif other["fingerprint"] != spec["fingerprint"]:
            for line in changes(spec, other):
                if not line.startswith("input "):
                    print(f"{spec['stage']} {role}: {line}".replace(" :", ":"))
                    different += 1
    print("no difference" if not different else f"{different} differences")
    return 0
