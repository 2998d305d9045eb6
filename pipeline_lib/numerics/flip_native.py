"""The CPU kernel of the bit-flip sampler: bit for bit the stream of `flip_reference`, in C, a tile at a time.

Where there is no C compiler the numpy reference draws the same bits at a tenth of the speed, and a warning says so.
"""

from __future__ import annotations

import ctypes
import platform
import subprocess
import warnings
from functools import lru_cache

import numpy as np
import torch

from pipeline_lib.numerics import flip_source, native
from pipeline_lib.numerics.flip_plan import FlipPlan
from pipeline_lib.numerics.flip_reference import DENSE_TAG, Window

_PER_THREAD = 1 << 18  # bytes below which another thread costs more than it saves
FLAGS = (("-DCLONES",), ()) if (platform.system(), platform.machine()) == ("Linux", "x86_64") else ((),)
"""The loops are compiled for several generations of processors where the compiler can do that."""
_POINTER, _INT64, _INT32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


class _Flip(ctypes.Structure):
    _fields_ = [
        *((name, _POINTER) for name in ("x", "gradient", "out")),
        ("key", ctypes.c_uint64),
        *((name, _INT64) for name in ("first_row", "rows", "first_element", "elements", "gate")),
        *((name, _POINTER) for name in ("thresholds", "digits", "masks", "tags", "bases", "lengths")),
        *((name, _INT32) for name in ("bits", "steps", "components")),
        ("constant", ctypes.c_uint32),
    ]


class _Tables:
    """A plan's numbers where C reads them."""

    def __init__(self, plan: FlipPlan) -> None:
        def array(values: list[int], dtype: type) -> np.ndarray:
            return np.array(values, dtype)

        parts = plan.sparse
        self.arrays = {
            "thresholds": array([t for part in parts for t in part.thresholds], np.uint64),
            "digits": array(list(plan.dense), np.uint32),
            "masks": array([part.mask & ((1 << plan.bits) - 1) for part in parts], np.uint32),
            "tags": array([part.tag for part in parts], np.uint32),
            "bases": array([part.base for part in parts], np.int32),
            "lengths": array([len(part.thresholds) for part in parts], np.int32),
        }
        self.values = {name: value.ctypes.data for name, value in self.arrays.items()}
        self.values |= {"bits": plan.bits, "steps": len(plan.dense), "components": len(parts)}
        self.values["constant"] = plan.constant & ((1 << plan.bits) - 1)


_tables = lru_cache(maxsize=256)(_Tables)


def flip_memory(x: int, out: int, plan: FlipPlan, window: Window, gate: int | None = None, gradient: int = 0) -> bool:
    """Flip the elements at address `x` into those at `out`, which may be the same, with torch's number of threads.

    Args:
        x, out: addresses of window.rows * window.elements elements of `plan.bits` bits.
        gate: bit pattern of the zero-out threshold; None for no gate.
        gradient: if not 0, the address of the elements that are written where the flipped `x` passes the gate.

    Returns:
        Whether the gate zeroed any element.
    """
    if window.rows * window.elements == 0:
        return False
    per_tile = 2**17 // plan.bits
    tiles = (window.first_element + window.elements - 1) // per_tile - window.first_element // per_tile + 1
    work = window.rows * window.elements * plan.bits // 8 * (1 + len(plan.dense))
    tables = _tables(plan)
    flip = _Flip(
        x=x, gradient=gradient or None, out=out, key=window.key & (2**64 - 1), first_row=window.first_row,
        rows=window.rows, first_element=window.first_element, elements=window.elements,
        gate=-1 if gate is None else gate, **tables.values,
    )  # fmt: skip
    threads = max(1, min(torch.get_num_threads(), work // _PER_THREAD))
    library = _library()
    assert library is not None, "ask is_available first"
    return bool(library.errata_flip(ctypes.byref(flip), window.rows * tiles, threads))


def is_available() -> bool:
    """Whether the kernel can be used here; builds it at the first call, and warns if that cannot be done."""
    return _library() is not None


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    try:
        library = native.load("flip", source(), *FLAGS)
    except (OSError, subprocess.SubprocessError) as error:
        warnings.warn(
            f"bit flips on the CPU run about ten times slower than they could, with the same bits: {error}. "
            "Install gcc or clang, or name a C compiler in CC.",
            stacklevel=2,
        )
        return None
    library.errata_flip.restype = ctypes.c_int
    library.errata_flip.argtypes = [_POINTER, _INT64, ctypes.c_int]
    return library


def source() -> str:
    """The C of the kernel."""
    return flip_source.C.replace("DENSE_TAG", f"{DENSE_TAG}u")
