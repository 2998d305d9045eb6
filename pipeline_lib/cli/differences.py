"""How two specs differ, in words."""

from __future__ import annotations

from typing import Any

from pipeline_lib.artifacts.files import read_json
from pipeline_lib.artifacts.store import STORE, Damaged, read_seal
from pipeline_lib.config.nodes import Node, spec_path


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """{a: {b: 1}} → {"a.b": 1}; lists by index."""
    if isinstance(value, dict) and value:
        items = value.items()
    elif isinstance(value, list) and value and any(isinstance(item, (dict, list)) for item in value):
        items = ((str(index), item) for index, item in enumerate(value))
    else:
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, item in items:
        found.update(flatten(item, f"{prefix}.{key}" if prefix else str(key)))
    return found


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """`key old → new` for each setting in which two specs differ; the inputs are named, not followed."""
    lines = []
    if old["version"] != new["version"]:
        lines.append(f"stage version {old['version']} → {new['version']}")
    before, after = flatten(old["settings"]), flatten(new["settings"])
    for key in sorted({*before, *after}):
        if before.get(key) != after.get(key):
            lines.append(f"{key} {before.get(key)!r} → {after.get(key)!r}")
    for role in sorted({*old["inputs"], *new["inputs"]}):
        one, two = old["inputs"].get(role), new["inputs"].get(role)
        if (one or {}).get("fingerprint") != (two or {}).get("fingerprint"):
            lines.append(f"input {role}: {one['id'] if one else 'none'} → {two['id'] if two else 'none'}")
    return lines


def stored_specs(stage: str) -> list[dict[str, Any]]:
    """The specs of all artifacts of a stage that are in the store."""
    found = []
    for path in sorted((STORE / stage).glob("*")):
        try:
            found.append(read_seal(path)["spec"])
        except Damaged:
            continue
    return found


def nearest(node: Node, specs: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The stored spec that differs least from a node's."""
    spec = node.spec()
    return min(specs, key=lambda other: len(changes(other, spec)), default=None)


def read_frozen(stage: str, node_id: str) -> dict[str, Any]:
    """A spec by its frozen file, or by the artifact's seal."""
    path = spec_path(stage, node_id)
    return read_json(path) if path.exists() else read_seal(STORE / stage / node_id)["spec"]
