"""Readable names of artifacts, from the settings that are fingerprinted."""

from __future__ import annotations

from typing import Any

from pipeline_lib.config.models import count_parameters
from pipeline_lib.config.names import human_count, slug


def transform_label(transform: list[dict[str, Any]]) -> str:
    """`plain`, `bitflip`, `int2+bitflip`: the types of a transform."""
    return "_".join(settings["type"] for settings in transform) or "plain"


def task_label(task: dict[str, Any]) -> str:
    """A task's own name, or its type."""
    return str(task.get("task") or task["type"])


def weights_label(settings: dict[str, Any]) -> str:
    """Recipe, transform, and the model's family and size."""
    model = settings["model"]
    if model["family"] == "hub":
        size = slug(model["repo"])
    elif model["family"] == "local":
        size = local_label(model["content"])
    else:
        size = f"{model['family']}-{human_count(count_parameters(model)[0])}"
    return f"{settings['recipe']['type']}-{transform_label(settings['transform'])}-{size}"


def local_label(content: str) -> str:
    """A local checkpoint's name, from the fingerprint of its content."""
    return f"local-{content[:6]}"
