"""Which sites a transform acts on, and with which settings. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from pipeline_lib.config.errors import UserError
from pipeline_lib.transforms.base import KINDS, Site

Overrides = dict[str, Any] | None


def _as_pairs(value: Any) -> Any:
    """A mapping, or the list of pairs that a spec holds (its JSON sorts keys; the order of patterns must survive)."""
    if isinstance(value, Mapping):
        pairs = list(value.items())
    elif isinstance(value, Sequence) and not isinstance(value, str):
        pairs = list(value)
    else:
        raise ValueError(f"sites must map patterns to settings or null, got {value!r}")
    if not pairs:
        raise ValueError('sites must not be empty; {"*": {}} is every site')
    for pair in pairs:
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise ValueError(f"sites must map patterns to settings or null, got {pair!r}")
        pattern, overrides = pair
        if not isinstance(pattern, str) or not pattern.strip():
            raise ValueError(f"a site pattern must be a non-empty string, got {pattern!r}")
        if overrides is not None and (not isinstance(overrides, Mapping) or "sites" in overrides):
            raise ValueError(f"pattern {pattern!r} must have settings (without `sites`) or null, got {overrides!r}")
    patterns = [pair[0] for pair in pairs]
    if len(set(patterns)) != len(patterns):
        raise ValueError(f"a site pattern is given twice: {patterns}")
    return [[pattern, None if overrides is None else dict(overrides)] for pattern, overrides in pairs]


SitePatterns = Annotated[
    tuple[tuple[str, Overrides], ...],
    BeforeValidator(_as_pairs),
    Field(
        validate_default=True,
        description="ordered map from patterns on layer names to settings that differ there, or to null = leave "
        "alone; the first match wins, * crosses dots, a prefix `linear:`, `product:`, `embedding:` or `kv:` "
        "restricts a pattern to that kind of site",
    ),
]
"""The type of a settings field `sites`; given as a mapping, kept and written as a list of pairs."""

EVERYWHERE: Any = {"*": {}}
IN_LAYERS = "*.layer*.*"
"""Everything inside the numbered layers of a llama (`model.layers.…`) or BERT (`bert.encoder.layer.…`): no head, no
embedding."""


def matches(pattern: str, site: Site) -> bool:
    """Whether `pattern` names `site`."""
    kind, colon, rest = pattern.partition(":")
    if colon and kind in KINDS:
        return kind == site.kind and fnmatchcase(site.name, rest)
    return fnmatchcase(site.name, pattern)


def choose(names: Iterable[str], patterns: Sequence[str], what: str, where: str) -> list[str]:
    """The names that any of the patterns matches, in their order; `what` and `where` are for the error.

    Raises:
        UserError: a pattern matches none.
    """
    names = list(names)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(
                f"the pattern matches no {what}",
                where=where,
                value=pattern,
                allowed=f"patterns on {', '.join(names[:24])}",
                fix="compare the pattern with the names above; * crosses dots",
            )
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def merge(settings: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` with `overrides` laid over, nested mappings key by key."""
    merged = dict(settings)
    for key, value in overrides.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged
