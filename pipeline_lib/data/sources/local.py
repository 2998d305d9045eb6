"""Files on this machine: jsonl, json, parquet or txt."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, field_validator

from pipeline_lib.artifacts.files import sha256_file
from pipeline_lib.config.errors import UserError
from pipeline_lib.config.hashes import file_hashes
from pipeline_lib.data.documents import SPLITS, Source, Unit
from pipeline_lib.data.formats import SUFFIXES, TableSettings

if TYPE_CHECKING:
    import pyarrow as pa


class Settings(TableSettings):
    """One pattern, a list of them, or one for each split; relative to the folder of config.yaml."""

    type: Literal["local"] = "local"
    path: str | list[str] | dict[Literal["train", "valid", "test"], str | list[str]] = Field(
        description="file or pattern (*, ?, **), a list of them, or {train, valid, test} of these"
    )
    sha256: dict[str, str] = Field({}, description="filled in: SHA-256 of each file")

    @field_validator("path")
    @classmethod
    def _not_empty(cls, value: Any) -> Any:
        if not value:
            raise ValueError("names no file: give a path, a list of paths, or one for each split")
        return value

    def check(self, where: str) -> None:
        """Raises UserError: a pattern matches no file, or a file has an unknown format."""
        for pattern in (pattern for _, patterns in self._patterns() for pattern in patterns):
            files = _files(pattern)
            if not files:
                raise UserError(
                    "no such file",
                    where=f"{where}.path",
                    value=pattern,
                    allowed="an existing file, or a pattern that matches one",
                    fix=f"correct the path; it is looked up from {os.getcwd()}",
                )
            for file in files:
                if not file.endswith(SUFFIXES):
                    raise UserError("unknown file format", where=f"{where}.path", value=file, allowed=SUFFIXES)

    def resolved(self) -> Self:
        """With the SHA-256 of each file, so that an edit makes another dataset and a touch does not."""
        files = {unit.name: unit.path for unit in self._units() if unit.path}
        return self.model_copy(update={"sha256": file_hashes(files)})

    def open(self, work: Path) -> Source:
        """The files, after a check that they are the ones that were planned."""
        self.check("dataset source local")
        units = self._units()
        now = {unit.name: sha256_file(unit.path) for unit in units if unit.path}
        for name in sorted({*now, *self.sha256}) if self.sha256 else []:
            if now.get(name) != self.sha256.get(name):
                raise UserError(
                    "changed since it was planned",
                    where=name,
                    value=now.get(name, "missing"),
                    allowed=self.sha256.get(name, "not there"),
                    fix="give the command again: it plans with the new content",
                )
        return _Files(self, units, now)

    def _patterns(self) -> list[tuple[str | None, list[str]]]:
        given: dict[str | None, Any] = {**self.path} if isinstance(self.path, dict) else {None: self.path}
        patterns = [(split, given[split]) for split in (None, *SPLITS) if split in given]
        return [(split, [paths] if isinstance(paths, str) else paths) for split, paths in patterns]

    def _units(self) -> list[Unit]:
        """Files in the order of the patterns, a pattern's own sorted; a file named twice counts once.

        A unit is named by the file's place below the folder that holds all files, so that ids (and with
        them the split) stay when the folder moves.
        """
        found: dict[str, str | None] = {}
        for split, patterns in self._patterns():
            for pattern in patterns:
                for file in _files(pattern):
                    found.setdefault(file, split)
        folder = os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in found]) if found else ""
        return [Unit(os.path.relpath(file, folder), split, Path(file)) for file, split in found.items()]


def _files(pattern: str) -> list[str]:
    if os.path.isfile(pattern):
        return [pattern]
    return sorted(file for file in glob.glob(pattern, recursive=True) if os.path.isfile(file))


class _Files(Source):
    def __init__(self, settings: Settings, units: list[Unit], hashes: dict[str, str]) -> None:
        self.settings, self._units, self.hashes = settings, units, hashes

    def units(self) -> list[Unit]:
        return self._units

    def batches(self, unit: Unit) -> Iterator[pa.Table]:
        assert unit.path is not None
        return self.settings.read(unit.path, unit.name, str(unit.path))

    def origin(self, read: list[Unit]) -> dict[str, Any]:
        return {"files": {unit.name: self.hashes[unit.name] for unit in read}}
