"""Documents in files: parquet, jsonl, json, csv and txt, all but the first also gzipped, jsonl also by zstd."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, model_validator

from pipeline_lib.config.base import added
from pipeline_lib.config.errors import UserError, closest
from pipeline_lib.data.documents import SourceSettings

if TYPE_CHECKING:
    import pyarrow as pa

SUFFIXES = (
    ".parquet", ".jsonl", ".json", ".csv", ".txt", ".jsonl.zst", ".jsonl.gz", ".json.gz", ".csv.gz", ".txt.gz"
)  # fmt: skip
BATCH_ROWS = 1024
_OWN = ("text", "id", "group")  # stored as strings, whatever they were


class TableSettings(SourceSettings):
    """Which columns of a table hold the documents; shared by the sources that read files."""

    text: str = Field("text", description="column that holds the text")
    id: str | None = Field(None, description="column that holds a unique id; default: file name and row")
    group: str | None = Field(None, description="column whose equal values never go to different splits")
    columns: list[str] = Field([], description="further columns to keep")
    separator: str | None = Field(
        None, min_length=1, description="txt files: what stands between documents; default: a file is one document"
    )

    lines: bool = added(False, "json files: one object a line, as in jsonl; false: a list of objects")

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        taken = {"id", "text", "group", self.text, self.id, self.group}
        for name in self.columns:
            if name in taken or self.columns.count(name) > 1:
                raise ValueError(f"columns: {name!r} is read already, or its name stands for something else here")
        return self

    def read(self, path: Path, name: str, where: str = "") -> Iterator[pa.Table]:
        """The documents in the file at `path`; `name` gives its format and their ids, `where` is for errors.

        Raises:
            UserError: not readable in its format, or a column is missing or no text.
        """
        import pyarrow as pa

        where = where or name
        kind = _kind(name, where)
        row = 0
        try:
            for table in _TABLES[kind](self, path, where):
                if self.id is None:
                    ids = pa.array([f"{name}:{row + i}" for i in range(table.num_rows)], pa.string())
                    table = table.add_column(0, "id", ids)
                row += table.num_rows
                yield table
        except (pa.ArrowException, OSError, EOFError, UnicodeDecodeError) as error:
            raise UserError(f"cannot be read as {kind}: {error}", where=where, fix="give an intact file") from None

    def _names(self) -> dict[str, str]:
        """Column here → column in the file."""
        own = {"text": self.text, "id": self.id, "group": self.group}
        return {**{here: there for here, there in own.items() if there}, **{name: name for name in self.columns}}


def _kind(name: str, where: str) -> str:
    for suffix in SUFFIXES:
        if name.endswith(suffix):
            return suffix.removesuffix(".gz").removesuffix(".zst")[1:]
    raise UserError(
        "unknown file format", where=where, allowed=SUFFIXES, fix="convert the file, or give its name the right suffix"
    )


def _no_column(column: str, there: list[str], where: str) -> UserError:
    return UserError(
        "no such column", where=where, value=column, allowed=there, fix=closest(column, there) or "set `text:` or `id:`"
    )


def _parquet(settings: TableSettings, path: Path, where: str) -> Iterator[pa.Table]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        names, schema = settings._names(), file.schema_arrow
        for column in names.values():
            if column not in schema.names:
                raise _no_column(column, schema.names, where)
        kind = schema.field(settings.text).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise UserError(f"column {settings.text} holds no text", where=where, value=str(kind))
        for batch in file.iter_batches(BATCH_ROWS, columns=sorted(set(names.values()))):
            columns = {here: batch.column(there) for here, there in names.items()}
            texts = {here: columns[here].cast(pa.string()) for here in _OWN if here in columns}
            yield pa.table({**columns, **texts})


def _jsonl(settings: TableSettings, path: Path, where: str) -> Iterator[pa.Table]:
    with _text(path) as file:
        yield from _rows_to_tables(settings, _json_lines(file, where), where)


def _json(settings: TableSettings, path: Path, where: str) -> Iterator[pa.Table]:
    if settings.lines:
        yield from _jsonl(settings, path, where)
        return
    with _text(path) as file:
        try:
            rows = json.load(file)
        except ValueError as error:
            raise UserError(f"not valid JSON: {error}", where=where, fix="give an intact file") from None
    if not isinstance(rows, list):
        raise UserError(
            "must hold a list of objects", where=where, fix="use jsonl, a list at the top, or `lines: true`"
        )
    yield from _rows_to_tables(settings, rows, where)


def _csv(settings: TableSettings, path: Path, where: str) -> Iterator[pa.Table]:
    """Comma-separated values with a line of names; every cell is text, an empty one too."""
    with _text(path) as file:
        rows = csv.DictReader(file, strict=True)
        try:
            yield from _rows_to_tables(settings, (_whole_row(row, rows.line_num, where) for row in rows), where)
        except csv.Error as error:
            raise UserError(f"not valid CSV: {error}", where=f"{where}, line {rows.line_num}", fix="mend it") from None


def _whole_row(row: dict[Any, Any], line: int, where: str) -> dict[str, str]:
    if None in row or None in row.values():
        raise UserError(
            "not valid CSV: a row has another number of cells", where=f"{where}, line {line}", fix="mend it"
        )
    return row


def _json_lines(file: io.TextIOBase, where: str) -> Iterator[Any]:
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                raise UserError(f"not valid JSON: {error}", where=f"{where}, line {number}", fix="mend it") from None


def _rows_to_tables(settings: TableSettings, rows: Iterable[Any], where: str) -> Iterator[pa.Table]:
    import pyarrow as pa

    names, schema, rows = settings._names(), None, iter(rows)
    while batch := list(islice(rows, BATCH_ROWS)):
        for row in batch:
            for column in names.values():
                if not isinstance(row, dict) or column not in row:
                    raise _no_column(column, sorted(row) if isinstance(row, dict) else [], where)
            if not isinstance(row[settings.text], str | None):
                raise UserError(f"column {settings.text} holds no text", where=where, value=row[settings.text])
        values = {here: [row[there] for row in batch] for here, there in names.items()}
        own = {here: pa.array(map(_encodable, values[here]), pa.string()) for here in _OWN if here in values}
        # Types are those of the first batch: a later row of another type is an error, not a silent change.
        table = pa.table({**values, **own}, schema=schema)
        schema = table.schema
        yield table


def _encodable(value: object) -> str | None:
    """A value as a string. JSON may hold lone surrogates, which are no text in UTF-8: replaced by U+FFFD."""
    if value is None:
        return None
    text = str(value)
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _txt(settings: TableSettings, path: Path, where: str) -> Iterator[pa.Table]:
    import pyarrow as pa

    with _text(path) as file:
        texts = iter([file.read()]) if settings.separator is None else _pieces(file, settings.separator)
        while batch := list(islice(texts, BATCH_ROWS)):
            yield pa.table({"text": pa.array(batch, pa.string())})


def _pieces(file: io.TextIOBase, separator: str) -> Iterator[str]:
    rest = ""
    while chunk := file.read(1 << 20):
        *whole, rest = (rest + chunk).split(separator)
        yield from whole
    yield rest


def _text(path: Path) -> io.TextIOBase:
    with open(path, "rb") as file:
        magic = file.read(4)
    if magic == b"\x28\xb5\x2f\xfd":
        import pyarrow as pa

        stream: Any = pa.input_stream(path, compression="zstd")
        return io.TextIOWrapper(stream, encoding="utf-8", newline="\n")
    if magic[:2] == b"\x1f\x8b":
        return gzip.open(path, "rt", encoding="utf-8", newline="\n")  # type: ignore[return-value]
    return open(path, encoding="utf-8", newline="\n")


_TABLES = {"parquet": _parquet, "jsonl": _jsonl, "json": _json, "csv": _csv, "txt": _txt}
