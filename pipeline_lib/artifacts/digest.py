"""One SHA-256 over all that sameness is claimed for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from pipeline_lib.artifacts.files import read_json, sha256_file
from pipeline_lib.artifacts.store import MANIFEST, SEAL
from pipeline_lib.config.fingerprint import canonical

COMPARED = {".safetensors", ".csv", ".parquet", ".jsonl", ".json"}


def compared_files(artifact: Path) -> dict[str, str]:
    """{file name: SHA-256 of what counts in it}: weights, tokens, records, CSV as they are, `result` of a JSON."""
    found = {}
    for path in sorted(artifact.rglob("*")):
        name = path.relative_to(artifact).as_posix()
        ours = name in (SEAL, MANIFEST) or name.startswith(("log/", "evaluator/"))
        if path.is_file() and not ours and path.suffix in COMPARED:
            found[name] = _content(path)
    return found


def _content(path: Path) -> str:
    if path.suffix != ".json":
        return sha256_file(path)
    value = read_json(path)
    counted = value["result"] if isinstance(value, dict) and "result" in value else value
    return hashlib.sha256(canonical(counted).encode()).hexdigest()


def digest(artifacts: Iterable[Path]) -> str:
    """Hex SHA-256 over the compared content of artifacts, whatever their order."""
    lines = [
        f"{artifact.parent.name}/{artifact.name}/{name} {value}"
        for artifact in artifacts
        for name, value in compared_files(artifact).items()
    ]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()
