"""Sealed checkpoints in a stage's work dir: complete and undamaged, or not used.

A checkpoint is a directory `step-000123`. Its seal, written last, holds the size and SHA-256 of every
file, so a checkpoint torn by a kill (no seal) or damaged later (wrong sum) is told from a good one.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from pipeline_lib.artifacts.files import read_json, sha256_file, sync, write_json
from pipeline_lib.artifacts.progress import say

SEAL = "seal.json"
_NAME = re.compile(r"step-(\d+)")


def checkpoint_name(step: int) -> str:
    """Directory name of the checkpoint after `step` optimizer steps."""
    return f"step-{step:06d}"


def step_of(path: Path) -> int:
    """The number of optimizer steps behind a checkpoint directory.

    Raises:
        ValueError: not a checkpoint's name.
    """
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path.name} is not the name of a checkpoint")
    return int(match[1])


def seal(directory: Path) -> None:
    """Declare the checkpoint complete: its files reach the disk first, the seal after them.

    With several ranks, rank 0 calls this after all of them have written.
    """
    files = {}
    for path in _files(directory):
        sync(path)
        files[path.relative_to(directory).as_posix()] = [path.stat().st_size, sha256_file(path)]
    for folder in [directory, *(path for path in directory.rglob("*") if path.is_dir())]:
        sync(folder)
    write_json(directory / SEAL, {"files": files})
    sync(directory.parent)


def fault_of(directory: Path) -> str:
    """Why the checkpoint may not be used, in a few words; empty when it is good."""
    if not (directory / SEAL).exists():
        return "it was never finished"
    try:
        sealed: dict[str, list] = read_json(directory / SEAL)["files"]
    except (ValueError, KeyError, TypeError, OSError):
        return "its seal is unreadable"
    for name, (size, digest) in sealed.items():
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, not {size}"
        if sha256_file(path) != digest:
            return f"{name} differs from its checksum"
    extra = {path.relative_to(directory).as_posix() for path in _files(directory)} - set(sealed)
    return f"{min(extra)} is not in its seal" if extra else ""


def newest_good(root: Path) -> Path | None:
    """The newest checkpoint below `root` whose seal verifies, or None.

    On the way there, a damaged checkpoint is renamed `damaged-…` and an unfinished one is deleted; both
    are said aloud. With several ranks, rank 0 calls this and tells the others (`agreed_newest`).
    """
    for path in reversed(_all(root)):
        fault = fault_of(path)
        if not fault:
            return path
        if not (path / SEAL).exists():
            say(f"checkpoint {path.name}: {fault} (a kill while it was written); it is removed and an older one used")
            shutil.rmtree(path)
            continue
        aside = _free_name(path.with_name(f"damaged-{path.name}"))
        say(f"DAMAGED CHECKPOINT {path}: {fault}; set aside as {aside.name}, an older one is used")
        path.rename(aside)
    return None


def agreed_newest(root: Path) -> Path | None:
    """`newest_good` found by rank 0, the same answer on every rank."""
    from pipeline_lib.training.distributed import from_first, rank

    return from_first(newest_good(root) if rank() == 0 else None)


def prune(root: Path, keep: int) -> None:
    """Delete all but the newest `keep` (at least 1) checkpoints."""
    for path in _all(root)[: -max(keep, 1)]:
        # Seal first: a kill in the middle then leaves an unfinished checkpoint, never a damaged one.
        (path / SEAL).unlink(missing_ok=True)
        shutil.rmtree(path)


def _all(root: Path) -> list[Path]:
    """Checkpoints below `root`, oldest first."""
    found = [path for path in root.glob("step-*") if path.is_dir() and _NAME.fullmatch(path.name)]
    return sorted(found, key=step_of)


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file() and path != directory / SEAL)


def _free_name(path: Path) -> Path:
    name, number = path, 1
    while name.exists():
        number += 1
        name = path.with_name(f"{path.name}-{number}")
    return name
