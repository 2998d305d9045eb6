"""Names that reach a path or a shell, and labels made from settings."""

from __future__ import annotations

import re

from pipeline_lib.config.errors import UserError

_NAME = re.compile(r"[a-z0-9]([a-z0-9._+-]{0,78}[a-z0-9])?")
REPOSITORY = r"^[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?$"  # on the hub; some old ones have no owner
OWNED_REPOSITORY = r"^[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*$"
RESERVED = frozenset({"store", "specs", "work", "logs", "quarantine", "sweeps", "tables", "publish", "plots"})


def check_name(kind: str, name: object, where: str) -> str:
    """`name`, if it is safe as a folder name, a file name and a shell word.

    Raises:
        UserError: it is not.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name) or ".." in name or name in RESERVED:
        raise UserError(
            f"not a valid name for a {kind}",
            where=where,
            value=name if len(str(name)) < 200 else str(name)[:200] + "…",
            allowed="at most 80 of a-z 0-9 . _ + -, first and last a letter or digit, no '..', "
            f"none of {', '.join(sorted(RESERVED))}",
            fix="rename it (quote a name made of digits only)",
        )
    return name


def slug(text: str) -> str:
    """`text` reduced to the characters of a label."""
    return re.sub(r"[^a-z0-9._]+", "-", text.lower()).strip("-._")[:60] or "x"


def human_count(count: int) -> str:
    """A count in at most four characters, for labels: 1344128 → '1.3m'."""
    for unit, size in (("b", 10**9), ("m", 10**6), ("k", 10**3)):
        if count >= size:
            value = count / size
            return f"{value:.1f}{unit}" if value < 10 else f"{value:.0f}{unit}"
    return str(count)
