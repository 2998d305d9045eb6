"""Documents in Parquet files, in row groups of bounded size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

ROW_GROUP_BYTES = 4 * 2**20  # of text: what later stages hold in memory at once
ROW_GROUP_ROWS = 4096


def text_bytes(table: pa.Table) -> np.ndarray:
    """Bytes of UTF-8 of each row's `text`, 0 where it is null; int64 [rows]."""
    lengths = pc.call_function("binary_length", [table["text"]]).fill_null(0)
    return lengths.to_numpy().astype(np.int64)


class GroupedWriter:
    """A Parquet file whose row groups depend on the rows alone, not on how they came; none without rows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: pq.ParquetWriter | None = None
        self._pending: list[pa.Table] = []
        self._rows = self._bytes = 0

    def add(self, table: pa.Table) -> None:
        """Append rows."""
        start = 0
        for row, length in enumerate(text_bytes(table).tolist()):
            self._rows += 1
            self._bytes += length
            if self._bytes >= ROW_GROUP_BYTES or self._rows >= ROW_GROUP_ROWS:
                self._pending.append(table.slice(start, row + 1 - start))
                start = row + 1
                self._flush()
        if start < table.num_rows:
            self._pending.append(table.slice(start))

    def _flush(self) -> None:
        group = pa.concat_tables(self._pending).combine_chunks()
        if self._file is None:
            order = ["id", "text", *(name for name in group.schema.names if name not in ("id", "text"))]
            self._schema = group.select(order).schema.remove_metadata()
            self._file = pq.ParquetWriter(self.path, self._schema, compression="zstd")
        group = group.select(self._schema.names).cast(self._schema)
        self._file.write_table(group, row_group_size=group.num_rows)
        self._pending, self._rows, self._bytes = [], 0, 0

    def close(self) -> bool:
        """Finish the file; whether there is one."""
        if self._pending:
            self._flush()
        if self._file is None:
            return False
        self._file.close()
        return True
