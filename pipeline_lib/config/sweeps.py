"""The points of a sweep: what each sets, from its grid and the settings in which the axes' names stand."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline_lib.config.errors import UserError

NAME = re.compile(r"\{([^{}]*)\}")


def points(
    grid: Mapping[str, list[Any] | dict[str, Any]], settings: Mapping[str, Any], where: str
) -> Iterator[tuple[list[Any], dict[str, Any]]]:
    """(values as they are shown, {dotted setting: value}) of each point, the last axis moving fastest.

    Args:
        grid: {axis: [values]} or {axis: {name: value}}.
        settings: in their keys and values `{axis}` stands for the axis' value, which keeps its type where it stands
            alone. An axis that they do not name is a dotted setting itself.

    Raises:
        UserError: an axis without values, a `{name}` that is no axis, or two keys that become one.
    """
    named = _names(dict(settings))
    for name in sorted(named - set(grid)):
        raise UserError(
            "no such axis",
            where=f"{where}.settings",
            value=f"{{{name}}}",
            allowed=list(grid),
            fix="name an axis of `grid`",
        )
    axes = [list(values.items()) if isinstance(values, dict) else [(v, v) for v in values] for values in grid.values()]
    for axis, values in zip(grid, axes, strict=True):
        if not values:
            raise UserError("an axis needs values", where=f"{where}.grid.{axis}", value=grid[axis], fix="give it some")
    for chosen in itertools.product(*axes):
        at = {axis: value for axis, (_, value) in zip(grid, chosen, strict=True)}
        own = {axis: value for axis, value in at.items() if axis not in named}
        yield [shown for shown, _ in chosen], {**own, **_filled(dict(settings), at, f"{where}.settings")}


def _names(template: Any) -> set[str]:
    """The `{names}` in a tree of mappings, lists and strings."""
    if isinstance(template, str):
        return set(NAME.findall(template))
    if isinstance(template, Mapping):
        return {name for key, value in template.items() for part in (key, value) for name in _names(part)}
    return {name for item in template for name in _names(item)} if isinstance(template, list) else set()


def _filled(template: Any, at: Mapping[str, Any], where: str) -> Any:
    """`template` with the axes' values in place of their names."""
    if isinstance(template, str):
        alone = NAME.fullmatch(template)
        return at[alone[1]] if alone else NAME.sub(lambda found: str(at[found[1]]), template)
    if isinstance(template, Mapping):
        filled = {str(_filled(key, at, where)): _filled(value, at, where) for key, value in template.items()}
        if len(filled) < len(template):
            raise UserError("two settings become one", where=where, value=list(template), fix="keep one of them")
        return filled
    return [_filled(item, at, where) for item in template] if isinstance(template, list) else template
