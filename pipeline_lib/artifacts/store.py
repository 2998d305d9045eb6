"""Artifacts on disk: sealed, published by rename, verified by every reader (DESIGN §5).

An artifact is a folder `results/store/<stage>/<id>/`. Its seal, `.manifest.json`, holds the spec and the
size and SHA-256 of every file; `manifest.json` is a copy that Snakemake takes for the rule's output and may
delete. Readers believe the seal only.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from pipeline_lib.artifacts.files import sha256_file, sync, write_bytes, write_json
from pipeline_lib.artifacts.locks import exclusive
from pipeline_lib.artifacts.progress import say
from pipeline_lib.config.fingerprint import fingerprint

RESULTS = Path("results")
STORE = RESULTS / "store"
WORK = RESULTS / "work"
QUARANTINE = RESULTS / "quarantine"
REQUESTS = QUARANTINE / "requests"
SEAL, MANIFEST = ".manifest.json", "manifest.json"
LOG = "log"  # files below it are kept but not sealed: reading them is nobody's input


class Damaged(Exception):
    """An artifact is not what its seal says."""


def lock_file(artifact: Path) -> Path:
    """The lock of an artifact's writer."""
    return WORK / f"{artifact.parent.name}--{artifact.name}.lock"


def work_directory(artifact: Path) -> Path:
    """Where an artifact's stage keeps its resumable state."""
    return WORK / f"{artifact.parent.name}--{artifact.name}"


def read_seal(artifact: Path) -> dict[str, Any]:
    """The seal, checked against its own checksum.

    Raises:
        Damaged: it is missing, not JSON, or changed.
    """
    try:
        data = (artifact / SEAL).read_bytes()
        if not data.endswith(b"}\n"):
            raise ValueError("cut off")
        seal = json.loads(data)
        own = seal.pop("seal")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise Damaged(f"{artifact / SEAL}: {error!r}") from None
    if own != fingerprint(seal):
        raise Damaged(f"{artifact / SEAL}: changed after it was written")
    return seal


def verify(artifact: Path, expected: str | None = None) -> dict[str, Any]:
    """The seal of a whole artifact; every byte is read.

    Raises:
        Damaged: a file is missing, cut, changed, or the artifact was made from another spec than `expected`.
    """
    seal = read_seal(artifact)
    if expected is not None and seal["spec"]["fingerprint"] != expected:
        raise Damaged(f"{artifact}: made from another spec ({seal['spec']['fingerprint'][:12]}…)")
    for name, (size, digest) in seal["files"].items():
        path = artifact / name
        if not path.is_file():
            raise Damaged(f"{path}: missing")
        if path.stat().st_size != size:
            raise Damaged(f"{path}: {path.stat().st_size} bytes instead of {size}")
        if sha256_file(path) != digest:
            raise Damaged(f"{path}: checksum differs")
    return seal


def publish(out: Path, artifact: Path, spec: dict[str, Any]) -> None:
    """Seal the folder `out` and make it the artifact, at once."""
    files = {}
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        if path.is_file() and not name.startswith(f"{LOG}/"):
            files[name] = [path.stat().st_size, sha256_file(path)]
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    seal = {"spec": spec, "files": files}
    write_json(out / SEAL, {**seal, "seal": fingerprint(seal)})
    artifact.parent.mkdir(parents=True, exist_ok=True)
    if artifact.is_dir():  # Snakemake makes the folder of a declared output, empty
        (artifact / MANIFEST).unlink(missing_ok=True)
    os.rename(out, artifact)
    sync(artifact.parent)
    mark(artifact)


def mark(artifact: Path) -> None:
    """(Re)write the copy of the seal that Snakemake sees."""
    write_bytes(artifact / MANIFEST, (artifact / SEAL).read_bytes())


def report_damage(artifact: Path, why: str) -> None:
    """A reader's part: note the damage for the next plan, which sets the artifact aside."""
    write_json(REQUESTS / f"{artifact.parent.name}--{artifact.name}.json", {"artifact": str(artifact), "why": why})
    say(f"DAMAGED {why}; it is set aside and remade when the same command is given again")


def set_aside(artifact: Path, why: str) -> Path:
    """Move a damaged artifact to results/quarantine."""
    place = QUARANTINE / f"{artifact.parent.name}--{artifact.name}-{time.time_ns()}"
    place.parent.mkdir(parents=True, exist_ok=True)
    os.rename(artifact, place)
    say(f"set aside as {place}: {why}")
    return place


def requested() -> list[Path]:
    """The damage reports that wait for the next plan."""
    return sorted(REQUESTS.glob("*--*.json"))


def set_aside_reported() -> None:
    """The planner's part: check every reported artifact again, under its lock, and move the damaged ones."""
    for request in requested():
        artifact = STORE / request.name.removesuffix(".json").replace("--", "/", 1)
        with exclusive(lock_file(artifact), str(artifact)):
            if artifact.exists():
                try:
                    verify(artifact)
                except Damaged as error:
                    set_aside(artifact, str(error))
        request.unlink(missing_ok=True)


def not_in_the_future(*paths: Path) -> None:
    """Snakemake fails a job whose output is older than an input: bring future time stamps back to now."""
    for path in paths:
        if path.exists() and path.stat().st_mtime > time.time():
            os.utime(path)
