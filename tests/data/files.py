"""Small local files, and the texts of a dataset artifact."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline_lib.data.sources import local

LINES = [f"line number {i}, ümlaut" for i in range(50)]


def write(path: Path, lines: list[str] = LINES) -> Path:
    """The lines in the format that the suffix names."""
    rows = [{"text": line} for line in lines]
    name = path.name.removesuffix(".gz").removesuffix(".zst")
    if name.endswith(".parquet"):
        pq.write_table(pa.table({"text": lines}), path)
        return path
    if name.endswith(".jsonl"):
        data = "".join(json.dumps(row) + "\n" for row in rows)
    else:
        data = json.dumps(rows) if name.endswith(".json") else "\n".join(lines)
    encoded = data.encode()
    if path.suffix == ".zst":
        encoded = pa.compress(encoded, "zstd", asbytes=True)
    path.write_bytes(gzip.compress(encoded) if path.suffix == ".gz" else encoded)
    return path


def settings(path: Any, **other: Any) -> dict[str, Any]:
    made = local.Settings(path=path, **other)
    made.check("config.yaml: datasets.d.source")
    return made.resolved().semantic()


def texts(out: Path, *splits: str) -> list[str]:
    files = [path for split in splits or ("train", "valid", "test") for path in sorted(out.glob(f"{split}-*.parquet"))]
    return [text for path in files for text in pq.read_table(path)["text"].to_pylist()]
