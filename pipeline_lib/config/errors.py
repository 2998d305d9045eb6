"""The one exception type for everything a user can mend."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

_ABSENT = object()


class UserError(Exception):
    """Bad input, told in one message: where, what, the value, what is allowed, and the fix.

    The command line prints it without a traceback and exits with 2 (1 inside Snakemake).
    """

    def __init__(
        self,
        what: str,
        *,
        where: str = "",
        value: Any = _ABSENT,
        allowed: Iterable[str] | str | None = None,
        fix: str = "",
    ) -> None:
        parts = [f"{where}: {what}" if where else what]
        if value is not _ABSENT:
            parts.append(f"  value:   {value!r}")
        if allowed is not None:
            parts.append(f"  allowed: {allowed if isinstance(allowed, str) else ', '.join(allowed)}")
        if fix:
            parts.append(f"  fix:     {fix}")
        super().__init__("\n".join(parts))


class Stopped(Exception):
    """A stage saved its state and stopped on request (SIGTERM or its own clock); exit code 75.

    Give the same command again and it goes on from there.
    """


def closest(name: str, names: Iterable[str]) -> str:
    """A 'did you mean' phrase for `name`, or an empty string when nothing is near."""
    near = get_close_matches(name, list(names), n=1)
    return f"did you mean '{near[0]}'?" if near else ""


def known(name: str, names: Iterable[str], section: str, where: str) -> str:
    """`name`, which `section` of the configuration must list.

    Raises:
        UserError: it does not.
    """
    listed = list(names)
    if name in listed:
        return name
    raise UserError(
        f"unknown {section.removesuffix('s')}",
        where=where,
        value=name,
        allowed=listed,
        fix=closest(name, listed) or f"add it under `{section}:`",
    )
