"""The documents of a source, divided into splits and written as Parquet; resumed unit by unit."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline_lib.artifacts.files import read_json, sha256_file, sync, write_json
from pipeline_lib.artifacts.job import Job
from pipeline_lib.artifacts.progress import Progress, say
from pipeline_lib.config.errors import UserError
from pipeline_lib.config.registry import SOURCES
from pipeline_lib.config.validate import validate
from pipeline_lib.data.documents import SPLITS, Source, SourceSettings, Unit, place
from pipeline_lib.data.parquet import GroupedWriter, text_bytes
from pipeline_lib.data.splits import Bounds, counted, hashes, names, shares


@dataclass
class Record:
    """What one unit came to.

    Attributes:
        documents, bytes: for each split; bytes of UTF-8 text.
        empty: rows without text, left out.
        files: [size, SHA-256] of the Parquet file of each split that got a document.
        full: `max_bytes` was reached in this unit.
    """

    unit: str
    documents: dict[str, int] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    empty: int = 0
    files: dict[str, list[Any]] = field(default_factory=dict)
    full: bool = False


def build(job: Job) -> None:
    """Make the dataset artifact in `job.out`; what is in `job.work` from a killed run is used if it is whole.

    Raises:
        UserError: the source cannot be had, or holds no documents for training.
    """
    given = job.settings["source"]
    settings = validate(SOURCES.load(given["type"]).Settings, given, "dataset source")
    assert isinstance(settings, SourceSettings)
    source = settings.open(job.work / "source")
    units = source.units()
    bounds, splits = _bounds(job, source, units), names(job.settings["split"])
    limit = job.settings["max_bytes"]
    records: list[Record] = []
    with Progress("documents", limit, "B") if limit else Progress("files", len(units), "file") as progress:
        for index, unit in enumerate(units):
            taken = sum(sum(record.bytes.values()) for record in records)
            left = None if limit is None else limit - taken
            folder = job.work / "units" / f"{index:05d}"
            record = _kept(folder, unit) or _convert(source, unit, splits, bounds, job.settings["seed"], left, folder)
            source.release(unit)
            records.append(record)
            progress.update(sum(record.bytes.values()) if limit else 1)
            if record.full:
                break
    _publish(job, source, units[: len(records)], records)


def _bounds(job: Job, source: Source, units: list[Unit]) -> Bounds:
    split, kept = job.settings["split"], job.work / "bounds.json"
    bounds = shares(split)
    if bounds is not None:
        return bounds
    if kept.exists():
        return Bounds(**read_json(kept))
    seed = job.settings["seed"]
    tables = (table for unit in units if unit.split is None for table in _texts(source, unit, Record(unit.name)))
    limited = _up_to(tables, job.settings["max_bytes"])
    bounds = counted(split, (hashes(_keys(table), seed) for table, _ in limited), "dataset split")
    write_json(kept, vars(bounds))
    return bounds


def _keys(table: pa.Table) -> list[str]:
    return table["group" if "group" in table.schema.names else "id"].to_pylist()


def _texts(source: Source, unit: Unit, record: Record) -> Iterator[pa.Table]:
    """The unit's documents that have text; the others are counted in `record`."""
    for table in source.batches(unit):
        texts = table.filter(pa.array(text_bytes(table) > 0))
        record.empty += table.num_rows - texts.num_rows
        yield texts


def _up_to(tables: Iterator[pa.Table], limit: int | None) -> Iterator[tuple[pa.Table, bool]]:
    """The tables up to the document that brings the text to `limit` bytes, each with whether it is the last so."""
    taken = 0
    for table in tables:
        ends = taken + np.cumsum(text_bytes(table))
        if limit is not None and len(ends) and ends[-1] >= limit:
            yield table.slice(0, int(np.searchsorted(ends, limit)) + 1), True
            return
        taken = int(ends[-1]) if len(ends) else taken
        yield table, False


def _kept(folder: Path, unit: Unit) -> Record | None:
    """What an earlier run made of the unit, if it is whole; else it is removed."""
    if not folder.exists():
        return None
    record = Record(**read_json(folder / "record.json"))
    whole = record.unit == unit.name and all(
        (path := folder / f"{split}.parquet").exists() and [path.stat().st_size, sha256_file(path)] == expected
        for split, expected in record.files.items()
    )
    if whole:
        return record
    say(f"{folder} is damaged and is made again")
    shutil.rmtree(folder)
    return None


def _convert(
    source: Source, unit: Unit, splits: tuple[str, ...], bounds: Bounds, seed: int, left: int | None, folder: Path
) -> Record:
    """Write one unit as <folder>/<split>.parquet for each split; the folder appears at once, by rename."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    record = Record(unit.name, dict.fromkeys(splits, 0), dict.fromkeys(splits, 0))
    writers = {split: GroupedWriter(temporary / f"{split}.parquet") for split in splits}
    for table, full in _up_to(_texts(source, unit, record), left):
        record.full = full
        if unit.split is not None:
            assigned = np.full(table.num_rows, SPLITS.index(unit.split), np.int8)
        else:
            assigned = bounds.assign(hashes(_keys(table), seed))
        if "group" in table.schema.names:
            table = table.drop_columns("group")
        for index, split in enumerate(splits):
            part = table.filter(pa.array(assigned == index))
            writers[split].add(part)
            record.documents[split] += part.num_rows
            record.bytes[split] += int(text_bytes(part).sum())
    for split, writer in writers.items():
        if writer.close():
            path = temporary / f"{split}.parquet"
            record.files[split] = [path.stat().st_size, sha256_file(path)]
    write_json(temporary / "record.json", vars(record))
    os.replace(temporary, folder)
    sync(folder.parent)
    return record


def _publish(job: Job, source: Source, units: list[Unit], records: list[Record]) -> None:
    splits = names(job.settings["split"])
    numbers = dict.fromkeys(splits, 0)
    for index, record in enumerate(records):
        for split in record.files:
            place(
                job.work / "units" / f"{index:05d}" / f"{split}.parquet",
                job.out / f"{split}-{numbers[split]:05d}.parquet",
            )
            numbers[split] += 1
    documents = {split: sum(record.documents[split] for record in records) for split in splits}
    sizes = {split: sum(record.bytes[split] for record in records) for split in splits}
    limit = job.settings["max_bytes"]
    if documents["train"] == 0:
        raise UserError(
            "no documents for training", where="dataset", value=documents, fix="give a larger source or a smaller split"
        )
    if limit is not None and not records[-1].full:
        say(f"the source holds {sum(sizes.values())} bytes of text, fewer than the {limit} asked for: all are taken")
    say(", ".join(f"{split} {documents[split]} documents, {sizes[split] / 1e6:.2f} MB" for split in splits))
    empty = sum(record.empty for record in records)
    result = {"documents": documents, "bytes": sizes, "without_text": empty, "source": source.origin(units)}
    write_json(job.out / "dataset.json", {"result": result, "provenance": {}})
