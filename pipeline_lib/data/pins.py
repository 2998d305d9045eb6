"""hub.lock.json written: the commits that hub branches stand for, asked from the hub."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pipeline_lib.artifacts.files import read_json, write_json
from pipeline_lib.config.pins import COMMIT, LOCK_FILE, lock_key
from pipeline_lib.data.hub import commit_of


def pin(entries: Iterable[tuple[str, str, str]], path: Path = LOCK_FILE) -> dict[str, str]:
    """Ask the hub for the commit of each (kind "model" | "dataset", repository, branch) and write it to `path`.

    Branches that are commits already are left out. Entries of other branches stay. Nothing is written
    unless every answer came.

    Returns:
        Key in the lock file → commit, for `entries`.

    Raises:
        UserError: no such repository or branch, no access, or the hub cannot be reached.
    """
    wanted = sorted({entry for entry in entries if not COMMIT.fullmatch(entry[2])})
    answers = {lock_key(kind, name, branch): commit_of(kind, name, branch) for kind, name, branch in wanted}
    known = read_json(path) if path.exists() else {}
    write_json(path, {**known, **answers})
    return answers
