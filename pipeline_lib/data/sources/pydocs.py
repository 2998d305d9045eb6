"""The standard library of the running interpreter: source text and language reference; needs no network."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field

from pipeline_lib.config.errors import UserError
from pipeline_lib.data import stdlib_text
from pipeline_lib.data.documents import Source, SourceSettings, Unit

if TYPE_CHECKING:
    import pyarrow as pa

BATCH = 64


class Settings(SourceSettings):
    """Every module is divided as a whole between the splits, and so is every topic of the reference."""

    type: Literal["pydocs"] = "pydocs"
    python: str = Field("current", description="'current', or the exact version that must be running, such as 3.11.7")
    document_bytes: int = Field(16384, ge=256, description="a longer module is divided between its definitions")
    library: str | None = Field(None, description="filled in: 16 hex digits of this library's file names and sizes")

    def check(self, where: str) -> None:
        """Raises UserError: another interpreter was asked for, or this one has no library to read."""
        if platform.python_implementation() != "CPython":
            raise UserError(
                "needs CPython", where=where, value=platform.python_implementation(), fix="make the .venv with CPython"
            )
        if self.python not in ("current", stdlib_text.version()):
            raise UserError(
                f"made for another interpreter than this one, {stdlib_text.version()}",
                where=f"{where}.python",
                value=self.python,
                allowed=f"current, {stdlib_text.version()}",
                fix="run with that interpreter, or set `python: current`",
            )
        if self.library not in (None, stdlib_text.digest()):
            raise UserError(
                "made for another build of this interpreter: the library's files differ",
                where=f"{where}.library",
                value=self.library,
                allowed=stdlib_text.digest(),
                fix="give the snakemake command again on this machine, which plans a dataset of its own",
            )
        if not stdlib_text.modules():
            raise UserError("this interpreter has no library of .py files", where=where, fix="use a full CPython")

    def resolved(self) -> Self:
        """With the version and the library of this interpreter, so that another one makes another dataset."""
        return self.model_copy(update={"python": stdlib_text.version(), "library": stdlib_text.digest()})

    def open(self, work: Path) -> Source:
        """The library, after a check that it is the one that was planned."""
        self.check("dataset source pydocs")
        return _Library(self.document_bytes)


class _Library(Source):
    def __init__(self, document_bytes: int) -> None:
        self.document_bytes = document_bytes

    def units(self) -> list[Unit]:
        return [Unit("library")]

    def batches(self, unit: Unit) -> Iterator[pa.Table]:
        import pyarrow as pa

        documents = list(stdlib_text.documents(self.document_bytes))
        for start in range(0, len(documents), BATCH):
            ids, groups, texts = zip(*documents[start : start + BATCH], strict=True)
            columns = {"id": ids, "text": texts, "group": groups}
            yield pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})

    def origin(self, read: list[Unit]) -> dict[str, Any]:
        return {"python": stdlib_text.version(), "library": stdlib_text.digest()}
