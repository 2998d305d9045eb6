"""The text of Python's standard library: source by module, and the language reference that `help()` shows.

Imports the standard library only, so that any interpreter can run it.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import sys
import sysconfig
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

# Left out: tests and optional parts that distributions package apart (so that a full and a slim CPython
# of one version give much the same), tables of character codes, and files that hold build paths.
_PARTS = ("distutils", "encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "tkinter", "turtle", "turtledemo")
LEFT_OUT = frozenset(
    {*_PARTS, "__hello__", "__phello__", "antigravity", "sitecustomize", "sysconfig", "test", "this", "venv"}
)
SKIPPED_FOLDERS = frozenset({"__pycache__", "test", "tests", "idle_test", "site-packages", "dist-packages"})
_DEFINITION = re.compile(
    r"^(?:(?:#.*\n)*(?:@.*\n)*(?:def|class|async def) |    (?:@.*\n    )*(?:def|class|async def) )", re.MULTILINE
)
_PARAGRAPH = re.compile(r"(?<=\n\n)(?=\S)")


def version() -> str:
    """The interpreter's version, for example '3.11.7'."""
    return platform.python_version()


@cache
def modules() -> list[tuple[str, Path]]:
    """(path below the library's folder with '/', file) of every module used, sorted by the former."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
        for file in files:
            relative = (Path(folder) / file).relative_to(root)
            top = relative.parts[0].removesuffix(".py")
            if file.endswith(".py") and top in sys.stdlib_module_names and top not in LEFT_OUT:
                found.append((relative.as_posix(), Path(folder) / file))
    return sorted(found)


def digest() -> str:
    """16 hex digits that tell this library from another: SHA-256 of the modules' names and sizes.

    Sizes, not contents: planning asks this every time. The dataset's own checksums cover the contents.
    """
    lines = [f"{name} {path.stat().st_size}" for name, path in modules()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def documents(limit: int) -> Iterator[tuple[str, str, str]]:
    """(id, group, text), always in the same order; a group is one module or one topic of the reference.

    A text of more than `limit` UTF-8 bytes is divided between definitions (source) or paragraphs (reference);
    a single definition may be longer than that. Files that are not UTF-8 are left out.
    """
    for name, path in modules():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for number, piece in enumerate(divide(text, _DEFINITION, limit)):
            yield f"{name}:{number}", name, piece
    for topic, text in sorted(_topics().items()):
        for number, piece in enumerate(divide(text, _PARAGRAPH, limit)):
            yield f"topics/{topic}:{number}", f"topics/{topic}", piece


def _topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # packaged apart by some distributions; the source alone still holds the docstrings
        return {}
    return topics


def divide(text: str, boundary: re.Pattern[str], limit: int) -> list[str]:
    """`text` cut at matches of `boundary` into pieces of at most `limit` bytes where the boundaries allow it."""
    starts = [0, *(match.start() for match in boundary.finditer(text) if match.start() > 0), len(text)]
    pieces, current, size = [], "", 0
    for start, end in pairwise(starts):
        part = text[start:end]
        length = len(part.encode())
        if current and size + length > limit:
            pieces.append(current)
            current, size = "", 0
        current, size = current + part, size + length
    return [piece for piece in [*pieces, current] if piece.strip()]
