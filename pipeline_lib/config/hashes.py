"""SHA-256 of files that planning depends on; large ones are not read anew by every plan."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

HASHES = Path("results/.hashes.json")
ALWAYS_HASHED = 32 * 2**20  # files up to this many bytes are read by every planning (about 30 ms at most)


def file_hashes(files: Mapping[str, Path]) -> dict[str, str]:
    """Hex SHA-256 of each file, by its name. Large files are read once and then known by size, inode and both times.

    A file's change time (ctime) moves with every write and cannot be set back, so an edit is seen
    even where the modification time is made to look old.
    """
    try:
        known = json.loads(HASHES.read_text())
    except (OSError, ValueError):
        known = {}
    fresh, hashes = {}, {}
    for name, path in files.items():
        stat = path.stat()
        if stat.st_size <= ALWAYS_HASHED:
            hashes[name] = _sha256(path)
            continue
        key = f"{os.path.realpath(path)} {stat.st_size} {stat.st_ino} {stat.st_mtime_ns} {stat.st_ctime_ns}"
        hashes[name] = fresh[key] = known.get(key) or _sha256(path)
    if set(fresh) - set(known):
        with contextlib.suppress(OSError):  # a read-only project: the file is read again next time
            _write({**known, **fresh})
    return hashes


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(hashes: dict[str, str]) -> None:
    """At once, so that a plan beside this one reads the old file or the new one."""
    HASHES.parent.mkdir(parents=True, exist_ok=True)
    temporary = HASHES.with_name(f"{HASHES.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(hashes, indent=1, sort_keys=True) + "\n")
    os.replace(temporary, HASHES)
