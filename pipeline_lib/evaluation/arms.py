"""A clean and a transformed arm as one result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline_lib.config.errors import UserError

MAY_DIFFER = frozenset({"transform", "fault_seeds", "transform_report", "metrics"})


def merge_arms(arms: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """{task, clean, transformed?} from the `result` of each arm.

    Raises:
        UserError: they differ in more than the transform and its fault seeds, or the clean one is not clean.
    """
    if set(arms) not in ({"clean"}, {"clean", "transformed"}):
        raise UserError("a result has a clean arm and at most a transformed one", value=sorted(arms))
    clean = arms["clean"]
    if clean["transform"] or clean["fault_seeds"]:
        raise UserError("the clean arm was evaluated under a transform", value=clean["transform"])
    for arm in arms.values():
        for key in sorted(set(arm) | set(clean)):
            if key not in MAY_DIFFER and arm.get(key) != clean.get(key):
                raise UserError(
                    "these arms cannot be compared: they differ in more than the transform",
                    where=f"result.{key}",
                    value={name: other.get(key) for name, other in arms.items()},
                    fix="evaluate both on the same weights, data, decoding and seeds",
                )
    return {"task": clean["task"], **{name: arms[name] for name in sorted(arms)}}
