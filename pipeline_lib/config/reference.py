"""docs/config.md, written by `python -m pipeline_lib.config.reference`: every key, from the settings that check it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from pipeline_lib.config.base import Settings
from pipeline_lib.config.registry import METHODS, RECIPES, SOURCES, TASK_TYPES, TRANSFORMS
from pipeline_lib.config.run import Run
from pipeline_lib.config.schema import Config

HEAD = """# Every key of config.yaml

Written by `python -m pipeline_lib.config.reference` from the settings that check the file; a test keeps it current.
A key without a default must be given. `null` means none. `a.b` is the key `b` of the mapping `a`.
"""
PLUGINS = (
    ("Transforms: `transforms.<name>`, `experiments.<name>.transform.<name>`", TRANSFORMS),
    ("Recipes: `recipes.<name>`, and `recipe.<name>` of models and experiments", RECIPES),
    ("Methods of the recipe cram: `recipe.cram.methods`", METHODS),
    ("Sources: `datasets.<name>.source`", SOURCES),
    ("Tasks: `tasks.<name>`", TASK_TYPES),
)


def page() -> str:
    """The page, as Markdown."""
    lines = [HEAD, "## Sections\n", _table(Config)]
    for title, registry in PLUGINS:
        lines.append(f"## {title}\n")
        for name in registry.names():
            lines += [f"### {name}\n", _table(registry.load(name).Settings)]
    return "\n".join(lines)


def _table(settings: type[Settings]) -> str:
    rows = [f"| `{key}` | {default} | {meaning} |" for key, default, meaning in _rows(settings, "", ())]
    if not rows:
        return "no settings\n"
    return "\n".join(["| key | default | meaning |", "|---|---|---|", *rows, ""])


def _rows(settings: type[Settings], prefix: str, above: tuple[type, ...]) -> Iterator[tuple[str, str, str]]:
    for name, field in settings.model_fields.items():
        key = f"{prefix}{field.alias or name}"
        if name in ("type", "family") and not field.description:
            continue  # said by the heading
        named = get_origin(field.annotation) is dict
        yield key, _default(field), _plain(field.description or "")
        for part in parts(field.annotation):
            if part not in above and not (part is Run and prefix):  # `run` of models and experiments is the section's
                yield from _rows(part, f"{key}.<name>." if named else f"{key}.", (*above, settings))


def parts(annotation: Any) -> list[type[Settings]]:
    """The settings classes within a type."""
    if isinstance(annotation, type) and get_origin(annotation) is None:
        return [annotation] if issubclass(annotation, Settings) else []
    return [part for argument in get_args(annotation) for part in parts(argument)]


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True) if field.default_factory is None else "see text"
    if value is PydanticUndefined:
        return "–"
    if isinstance(value, Settings):
        return "as below" if type(value) is not Run else "see `run`"
    shown = {None: "null", True: "true", False: "false"}.get(value, value) if isinstance(value, bool | None) else value
    return f"`{shown}`" if shown != () else "`[]`"


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|")


if __name__ == "__main__":
    print(page(), end="")
