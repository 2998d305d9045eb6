"""Settings that choose between a repaired behaviour and the published one: which of the two ran."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PUBLISHED: dict[str, Any] = {
    "decay_norms": True,
    "hessian": "published",
    "masks": "fresh",
    "warmup": "published",
    "fields": "published",
    "first_token": "published",
    "padding": "published",
    "epoch": "published",
    "average": "published",
}
"""Switch → its value under which what was published runs, faults included."""


def of_recipe(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """{switch: value} of a recipe and its methods, as a spec holds them; what it does not hold is at its default."""
    found: dict[str, Any] = {"decay_norms": recipe.get("decay_norms", False)} if recipe.get("type") == "cram" else {}
    for method in recipe.get("methods", ()):
        found |= {f"{method['type']}: {name}": method[name] for name in PUBLISHED if name in method}
    return found


def of_task(task: Mapping[str, Any]) -> dict[str, Any]:
    """{switch: value} of a task's settings."""
    return {name: task[name] for name in PUBLISHED if name in task}


def as_published(switch: str, value: Any) -> bool:
    """Whether this value is the published behaviour."""
    return value == PUBLISHED[switch.rpartition(" ")[2]]
