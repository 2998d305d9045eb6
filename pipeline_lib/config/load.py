"""config.yaml from disk: strict YAML, overrides, schema."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from pipeline_lib.config.errors import UserError
from pipeline_lib.config.names import check_name
from pipeline_lib.config.schema import Config
from pipeline_lib.config.validate import validate

SECTIONS = (
    "tokenizers", "datasets", "models", "transforms", "recipes", "tasks", "experiments", "sweeps", "tables",
    "comparisons",
)  # fmt: skip


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML in which a key given twice is an error, and 1e-4 is a number."""


def _mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    loader.flatten_mapping(node)
    values: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in values:
            line = key_node.start_mark.line + 1
            raise UserError(
                "key given twice", where=f"{loader.name}, line {line}", value=key, fix="keep one of the two"
            )
        values[key] = loader.construct_object(value_node, deep=True)
    return values


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
# YAML 1.1 reads 1e-4 (without a dot) as a string; researchers mean the number.
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        UserError: no such file, not YAML, a key twice, or not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot be read: {error}", where=str(path), fix="run in the folder that holds config.yaml"
        ) from None
    try:
        loader = _StrictLoader(text)
        loader.name = str(path)
        values = loader.get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else str(path)
        raise UserError(
            f"not valid YAML: {getattr(error, 'problem', error)}",
            where=where,
            fix="check indentation, colons and quotes",
        ) from None
    if not isinstance(values, dict):
        raise UserError(
            "must be a mapping of sections", where=str(path), value=values, allowed=sorted(Config.model_fields)
        )
    return values


def merge(base: Any, over: Any) -> Any:
    """`base` with the mappings of `over` laid over it, deeply; lists and scalars are replaced."""
    if isinstance(base, dict) and isinstance(over, dict):
        return {**base, **{key: merge(base.get(key), value) for key, value in over.items()}}
    return over


def load_config(path: Path, overrides: dict[str, Any] | None = None) -> Config:
    """The checked configuration in `path`, with `overrides` (from --config, --configfile) merged over it."""
    raw = merge(read_yaml(path), overrides or {})
    for section in SECTIONS:
        entries = raw.get(section)
        if entries is None:
            continue
        if not isinstance(entries, dict):
            raise UserError(
                "must be a mapping of names",
                where=f"{path}: {section}",
                value=entries,
                fix=f"write `{section}:` with one entry a name",
            )
        for name in entries:
            check_name(section.removesuffix("s"), name, f"{path}: {section}")
    return validate(Config, {key: value for key, value in raw.items() if value is not None}, str(path))
