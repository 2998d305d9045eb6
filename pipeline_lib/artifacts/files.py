"""Durable small files: written beside, synced, renamed."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from pathlib import Path
from typing import Any


def write_bytes(path: Path, data: bytes, durable: bool = True) -> None:
    """Replace `path` by `data` at once: a reader sees the old bytes or the new ones, also after a crash.

    Not `durable`: a power failure may lose the new bytes; for what the next plan writes again anyway.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    host = zlib.crc32(os.uname().nodename.encode())  # two containers can have the same process id
    temporary = path.with_name(f".{path.name}.{os.getpid()}{host}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    os.replace(temporary, path)
    if durable:
        sync(path.parent)


def write_json(path: Path, value: Any, durable: bool = True) -> None:
    """Write `value` as indented JSON with sorted keys; NaN and infinity are refused."""
    text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False)
    write_bytes(path, (text + "\n").encode(), durable)


def read_json(path: Path) -> Any:
    """The value in a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Make a file's bytes durable, or the renames in a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
