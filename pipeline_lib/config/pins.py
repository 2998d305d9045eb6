"""Which commit a hub id stands for: hub.lock.json, read by planning, written by `pin`."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from pathlib import Path

from pipeline_lib.config.errors import UserError

LOCK_FILE = Path("hub.lock.json")
COMMIT = re.compile(r"[0-9a-f]{40}")


@lru_cache(maxsize=8)
def _read(path: Path, _size_and_time: tuple[int, int]) -> dict[str, str]:
    try:
        entries = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(
            f"not valid JSON: {error}", where=str(path), fix="restore it from git, or run `python -m pipeline_lib pin`"
        ) from None
    for key, commit in entries.items():
        if not isinstance(commit, str) or not COMMIT.fullmatch(commit):
            raise UserError(
                "not a commit",
                where=f"{path}: {key}",
                value=commit,
                allowed="40 hexadecimal digits",
                fix="run `python -m pipeline_lib pin`",
            )
    return entries


def lock_key(repo_type: str, repo: str, branch: str) -> str:
    """The key of a repository's branch in the lock file."""
    return f"{repo_type}s/{repo}@{branch}"


def pinned(repo_type: str, repo: str, branch: str, path: Path = LOCK_FILE) -> str:
    """The commit that `repo@branch` is pinned to; `branch` itself when it is a commit or has no entry.

    Planning without an entry is allowed: the artifact then records the commit it was made from.
    """
    if COMMIT.fullmatch(branch) or not path.exists():
        return branch
    stat = path.stat()
    return _read(path, (stat.st_size, stat.st_mtime_ns)).get(lock_key(repo_type, repo, branch), branch)
