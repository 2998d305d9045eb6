"""Several sources one after another, as one: {type: joined, sources: [{type: hub, …}, …]}."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, SerializeAsAny

from pipeline_lib.config.errors import UserError
from pipeline_lib.config.pins import pinned
from pipeline_lib.config.registry import SOURCES
from pipeline_lib.config.validate import validate
from pipeline_lib.data.documents import Source, SourceSettings, Unit

if TYPE_CHECKING:
    import pyarrow as pa


def _part(given: Any) -> Any:
    if isinstance(given, SourceSettings):
        return given
    if not isinstance(given, dict) or given.get("type") in (None, "joined"):
        raise ValueError(f"{given!r} is no source: give {{type: hub, …}} or another that is not joined itself")
    try:
        return validate(SOURCES.load(given["type"]).Settings, given, f"source {given['type']}")
    except UserError as error:
        raise ValueError(str(error)) from None


class Settings(SourceSettings):
    """The documents of all sources, in order."""

    type: Literal["joined"] = "joined"
    sources: tuple[Annotated[SerializeAsAny[SourceSettings], BeforeValidator(_part)], ...] = Field(
        min_length=1, description="settings of sources, each with its type"
    )
    rows: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (), description="rows of each source that become one document, one after another; default: 1 of each"
    )

    def check(self, where: str) -> None:
        """Check every part.

        Raises:
            UserError: a part's, or `rows` is not as long as `sources`.
        """
        if self.rows and len(self.rows) != len(self.sources):
            raise UserError(
                "has not one number for each source", where=f"{where}.rows", value=self.rows, fix="give one for each"
            )
        for number, source in enumerate(self.sources):
            source.check(f"{where}.sources.{number}")

    def resolved(self) -> Self:
        """Every part resolved, those on the hub pinned."""
        return self.model_copy(update={"sources": tuple(_pinned(source.resolved()) for source in self.sources)})

    def open(self, work: Path) -> Source:
        """All of them."""
        parts = [source.open(work / str(number)) for number, source in enumerate(self.sources)]
        return _Joined(parts, self.rows or (1,) * len(parts))


def _pinned(source: Any) -> Any:
    if not hasattr(source, "repo"):
        return source
    return source.model_copy(update={"revision": pinned("dataset", source.repo, source.revision)})


class _Joined(Source):
    def __init__(self, parts: list[Source], rows: tuple[int, ...]) -> None:
        self.parts, self.rows = parts, rows
        self._own: dict[str, tuple[int, Unit]] = {}

    def units(self) -> list[Unit]:
        for number, part in enumerate(self.parts):
            self._own |= {f"{number}/{unit.name}": (number, unit) for unit in part.units()}
        return [replace(unit, name=name) for name, (_, unit) in self._own.items()]

    def batches(self, unit: Unit) -> Iterator[pa.Table]:
        import pyarrow as pa

        number, own = self._own[unit.name]
        rows = self.rows[number]
        for table in self.parts[number].batches(own):
            ids = [f"{number}/{key}" for key in table["id"].to_pylist()][::rows]
            texts = table["text"].to_pylist()
            texts = [" ".join(filter(None, texts[at : at + rows])) for at in range(0, len(texts), rows)]
            columns = {"id": pa.array(ids, pa.string()), "text": pa.array(texts, pa.string())}
            if "group" in table.schema.names:
                columns["group"] = pa.array(table["group"].to_pylist()[::rows], pa.string())
            yield pa.table(columns)

    def release(self, unit: Unit) -> None:
        number, own = self._own[unit.name]
        self.parts[number].release(own)

    def origin(self, read: list[Unit]) -> dict[str, Any]:
        found = {}
        for number, part in enumerate(self.parts):
            own = [self._own[unit.name][1] for unit in read if self._own[unit.name][0] == number]
            found[str(number)] = part.origin(own) if own else {}
        return {"sources": found}
