"""GLUE and SuperGLUE in small: the columns and files of the hub's repositories, made sentences, labels that follow."""

from __future__ import annotations

import io
import random
from typing import Any

from pipeline_lib.evaluation.benchmark import DataSet
from tests.evaluation.conftest import WORDS

GOOD, BAD, NEITHER = WORDS[:4], WORDS[4:8], WORDS[8:]


def sentence(rng: random.Random, words: list[str]) -> str:
    """Some of these words."""
    return " ".join(rng.choice(words) for _ in range(rng.randint(3, 7)))


def rows(data_set: DataSet, count: int, seed: int) -> dict[str, list[Any]]:
    """Columns: the class of an example shows in its last field alone, the others are noise."""
    rng = random.Random(seed)
    labels = [float(at % 5) if data_set.classes == 1 else at % data_set.classes for at in range(count)]
    columns: dict[str, list[Any]] = {"label": labels, "idx": list(range(count))}
    for field in data_set.fields:
        last = field == data_set.fields[-1]
        columns[field] = [sentence(rng, (GOOD if label else BAD) if last else NEITHER) for label in labels]
    return columns


def parquet(columns: dict[str, list[Any]]) -> bytes:
    """A Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def repository(sets: dict[str, DataSet], train: int = 40, validation: int = 20) -> dict[str, bytes]:
    """{path: bytes} of a benchmark's repository."""
    files = {"README.md": b"# made\n"}
    for number, (name, found) in enumerate(sets.items()):
        sizes = {"train": train + 8 * number, found.validation: validation, found.extra: validation, "test": 3}
        for split, size in sizes.items():
            if split:
                made = parquet(rows(found, size, 100 * number + len(split)))
                files[f"{name}/{split}-00000-of-00001.parquet"] = made
    return files
