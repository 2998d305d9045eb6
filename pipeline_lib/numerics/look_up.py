"""Packed codes to values on a CPU: a table's row for each byte, in C where there is a compiler.

On a tile that stays in the cache `index_select` takes 2.7 times as long (252 rows of 4,160 fp32 values, one thread).
"""

from __future__ import annotations

import ctypes
import subprocess
import warnings
from functools import lru_cache

import torch
from torch import Tensor

from pipeline_lib.numerics import native

_LEAST_PER_THREAD = 2**17  # values; below it a thread costs more than it brings

SOURCE = r"""
#include <string.h>

typedef struct { const uint8_t *packed; const char *table; char *out; int64_t bytes, features, entry, size; } LookUp;

/* Rows begin .. end; `entry` bytes of the table for each packed byte, `size` bytes a value, the last entry cut. */
#define ROWS(ENTRY)                                                                     \
    for (int64_t r = begin; r < end; r++) {                                             \
        const uint8_t *packed = l->packed + r * l->bytes;                               \
        char *out = l->out + r * l->features * l->size;                                 \
        const int64_t whole = l->features * l->size / (ENTRY);                          \
        for (int64_t b = 0; b < whole; b++)                                             \
            memcpy(out + b * (ENTRY), l->table + packed[b] * (ENTRY), ENTRY);           \
        const int64_t rest = l->features * l->size - whole * (ENTRY);                   \
        if (rest) memcpy(out + whole * (ENTRY), l->table + packed[whole] * (ENTRY), rest); \
    }

static void rows(void *data, int64_t begin, int64_t end)
{
    const LookUp *l = data;
    switch (l->entry) { /* sizes that are known to the compiler become plain moves */
    case 5: ROWS(5) break;
    case 8: ROWS(8) break;
    case 10: ROWS(10) break;
    case 16: ROWS(16) break;
    case 20: ROWS(20) break;
    default: ROWS(l->entry)
    }
}

void look_up(LookUp *l, int64_t count, int threads) { in_parallel(rows, l, count, threads); }
"""


class _LookUp(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("packed", "table", "out")),
        *((name, ctypes.c_int64) for name in ("bytes", "features", "entry", "size")),
    )


def look_up(table: Tensor, packed: Tensor, features: int) -> Tensor:
    """[rows, features], of the table's dtype.

    Args:
        table: [256, n], any dtype: the values that each byte holds.
        packed: uint8 [rows, bytes], at least features / n bytes a row; what is over counts for nothing.
    """
    eager = type(packed) is Tensor and packed.device.type == "cpu" and not torch.compiler.is_compiling()
    if not eager or table.requires_grad or (library := _library()) is None:
        return table.index_select(0, packed.flatten().int()).view(len(packed), -1)[:, :features]
    table, packed = table.contiguous(), packed.contiguous()
    out = torch.empty(len(packed), features, dtype=table.dtype)
    pointers = (tensor.data_ptr() for tensor in (packed, table, out))
    arguments = _LookUp(*pointers, packed.shape[1], features, table.shape[1] * table.itemsize, table.itemsize)
    threads = max(1, min(torch.get_num_threads(), out.numel() // _LEAST_PER_THREAD))
    library.look_up(ctypes.byref(arguments), ctypes.c_int64(len(packed)), threads)
    return out


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    try:
        return native.load("look-up", SOURCE)
    except (OSError, subprocess.SubprocessError) as error:
        warnings.warn(f"packed weights are unpacked slowly, with the same values: {error}", stacklevel=3)
        return None
