"""Readable results: copies of published files, fresh by content."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from pipeline_lib.artifacts.files import read_json, write_bytes, write_json
from pipeline_lib.artifacts.store import RESULTS, Damaged, not_in_the_future, report_damage, verify


def _marker(view: Path) -> Path:
    return RESULTS / ".views" / f"{view.relative_to(RESULTS).as_posix().replace('/', '--')}.json"


def source(view: Path) -> Path | None:
    """The artifact file that a readable result was copied from, if it is one of ours."""
    try:
        return Path(read_json(_marker(view))["source"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def is_fresh(view: Path, source_file: Path) -> bool:
    """Whether `view` is, byte for byte, the copy of `source_file` it should be."""
    try:
        marker = read_json(_marker(view))
        digest = hashlib.sha256(view.read_bytes()).hexdigest()
    except (OSError, ValueError):
        return False
    return marker == {"source": str(source_file), "sha256": digest}


def make_stale(view: Path) -> None:
    """Give `view` an old time stamp, so that Snakemake renews it."""
    if view.exists():
        os.utime(view, (1, 1))


def copy_view(source_file: Path, view: Path, spec_file: Path) -> bool:
    """Copy a published file to its readable path; False when the artifact is damaged (and reported)."""
    artifact = source_file.parent
    try:
        verify(artifact)
    except Damaged as error:
        report_damage(artifact, str(error))
        return False
    not_in_the_future(artifact / "manifest.json", spec_file)
    data = source_file.read_bytes()
    write_json(_marker(view), {"source": str(source_file), "sha256": hashlib.sha256(data).hexdigest()})
    write_bytes(view, data)
    return True
