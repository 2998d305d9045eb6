"""The reference of the bit-flip sampler: numpy on memory shared with torch, at a cost proportional to the hits.

**The stream, fixed here for every device.** A fault stream has a 64-bit key and consists of rows; a row is an endless
sequence of 32-bit words. An activation's row is the sequence's index in the global batch, a weight's row the virtual
device. Element e of a row (position-major, feature-minor) of 8, 16 or 32 bits lies in word e * bits // 32, elements of
lower index in the lower bits. Words form tiles of 4096. All randomness is Philox4x32-10 under the stream's key, at

    word 0 = tile within the row (32 bits)     word 1 = row (32 bits)     word 2 = call     word 3 = tag

    tag c << 28 (c = 0, 1; (c + 1) << 28 from the third on): sparse component c of the plan
        call 0:      output words 0, 1 = low, high half of u; the tile's count is N = base + #{j : u >= T_j}
        call q + 1:  output words 0..3 = hits 4q .. 4q + 3 (those below N count); a hit, w its low 17 bits, toggles bit
                     w & 31 of word w >> 5 of the tile, if that bit is in the component's mask
    tag (2 << 28) + j: dense step j;  call i: output word k belongs to word 4i + k of the tile
        m starts at 0;  m = (m & r) | (C_j & (m | r))  for j from the least significant digit

A mask so depends on (key, row, element) and the plan alone: not on batch size, padding behind the row, block size, rank
or device. A tensor that starts at `first_element` of its rows, as in token-by-token decoding, sees the same mask as
the full forward. Rows, tiles and calls count modulo 2^32.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from pipeline_lib.numerics.flip_plan import TILE_BITS_LOG2, TILE_WORDS, Component, FlipPlan
from pipeline_lib.numerics.philox import LOW, philox4x32_numpy

DENSE_TAG = 2 << 28
_CALLS = 1 << 14  # Philox calls of one pass: its buffers stay in the cache
_POSITION = np.uint32((1 << TILE_BITS_LOG2) - 1)
_SHIFT = {8: 3, 16: 4, 32: 5}
_UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32}


class Window(NamedTuple):
    """The part of a stream that a tensor [rows, elements] covers."""

    key: int
    first_row: int
    rows: int
    first_element: int
    elements: int


def flip_array(x: np.ndarray, plan: FlipPlan, window: Window) -> np.ndarray | None:
    """XOR the stream's mask into `x`, a contiguous 1-D unsigned array of rows * elements elements of `plan.bits` bits.

    Returns:
        int64 indices of all elements that may have changed (some more than once), or None where that may be all.
    """
    if x.size == 0:
        return np.zeros(0, np.int64)
    if plan.constant:
        x ^= x.dtype.type(plan.constant & ((1 << plan.bits) - 1))
    if plan.dense:
        _flip_dense(x.reshape(window.rows, window.elements), plan, window)
    touched = []
    for component in plan.sparse:
        index, bit = sparse_hits(component, plan.bits, window)
        np.bitwise_xor.at(x, index, bit)  # hits may repeat; each one toggles
        touched.append(index)
    if plan.constant or plan.dense:
        return None
    return touched[0] if len(touched) == 1 else np.concatenate([np.zeros(0, np.int64), *touched])


def sparse_hits(component: Component, bits: int, window: Window) -> tuple[np.ndarray, np.ndarray]:
    """All hits of one component inside the window, repeated ones included.

    Returns:
        int64 [hits], index of the element in the flattened [rows, elements], and [hits] of the element's unsigned dtype
        with the one bit set that the hit toggles.
    """
    per_tile_log2 = TILE_BITS_LOG2 - _SHIFT[bits]  # elements of a tile
    tile0 = window.first_element >> per_tile_log2
    tiles = ((window.first_element + window.elements - 1) >> per_tile_log2) - tile0 + 1
    offset = (tile0 << per_tile_log2) - window.first_element
    calls = (component.likely_count + 3) // 4 + 1
    step = max(1, _CALLS // calls)
    parts = []
    for low in range(0, window.rows * tiles, step):
        grid = _grid(tiles, low, min(window.rows * tiles, low + step), calls, window.elements, per_tile_log2)
        lane, word = _draw(component, grid, tile0, window)
        parts.append(_locate(component, bits, lane, word, grid, offset, window.elements))
    if len(parts) == 1:
        return parts[0]
    return np.concatenate([index for index, _ in parts]), np.concatenate([bit for _, bit in parts])


class _Grid(NamedTuple):
    """Some consecutive tiles of [rows, tiles], counted from the window's first row and first tile.

    int64 [n] row, tile and `start`, the tile's first element in the flattened [rows, elements]; counter words 0 and 2
    (`even`, uint64 [2, n * calls]) and 1 (`odd`, uint32 [1, n * calls]) of the calls 0 .. calls - 1 of each tile.
    """

    row: np.ndarray
    tile: np.ndarray
    start: np.ndarray
    even: np.ndarray
    odd: np.ndarray


@lru_cache(maxsize=32)
def _grid(tiles: int, low: int, high: int, calls: int, elements: int, per_tile_log2: int) -> _Grid:
    row, tile = np.divmod(np.arange(low, high), tiles)
    even = np.stack([np.repeat(tile, calls), np.tile(np.arange(calls), high - low)]).astype(np.uint64)
    odd = np.repeat(row, calls).astype(np.uint32)[None]
    return _Grid(row, tile, row * elements + (tile << per_tile_log2), even, odd)


def _draw(component: Component, grid: _Grid, tile0: int, window: Window) -> tuple[np.ndarray, np.ndarray]:
    """Counts and hits of some tiles: int64 [hits] index of the tile in the grid, uint32 [hits] random word."""
    lanes = len(grid.tile)
    calls = grid.odd.shape[1] // lanes
    even = grid.even.copy()
    if tile0:
        even[0] = (even[0] + np.uint64(tile0)) & np.uint64(LOW)
    odd = grid.odd + np.array([[window.first_row & LOW], [0]], np.uint32)
    odd[1] = component.tag
    even_out, odd_out = philox4x32_numpy(even, odd, window.key)
    words = np.empty((lanes, calls, 2, 2), np.uint32)
    words[..., 0] = even_out.reshape(2, lanes, calls).transpose(1, 2, 0)
    words[..., 1] = odd_out.reshape(2, lanes, calls).transpose(1, 2, 0)
    uniform = words.view(np.uint64)[:, 0, 0, 0]
    count = component.base + np.searchsorted(_thresholds(component), uniform, side="right")
    drawn = 4 * (calls - 1)
    wanted = np.flatnonzero(np.arange(drawn) < count[:, None])
    lane = wanted // drawn if drawn else wanted
    word = words.reshape(-1)[wanted + 4 * (lane + 1)]  # behind the call for the count
    if count.max() <= drawn:
        return lane, word
    more = np.flatnonzero(count > drawn)
    row, tile = grid.row[more] + window.first_row, grid.tile[more] + tile0
    late_lane, late_word = _draw_late(component, row, tile, count[more], calls, window.key)
    return np.concatenate([lane, more[late_lane]]), np.concatenate([word, late_word])


def _draw_late(
    component: Component, row: np.ndarray, tile: np.ndarray, count: np.ndarray, first_call: int, key: int
) -> tuple[np.ndarray, np.ndarray]:
    """The hits from call `first_call` on, of tiles with more hits than were drawn at once."""
    calls = (count + 3) // 4 + 1 - first_call
    lane = np.repeat(np.arange(len(tile)), calls)
    call = np.arange(len(lane)) - np.repeat(np.cumsum(calls) - calls, calls) + first_call
    even = np.stack([tile[lane] & LOW, call]).astype(np.uint64)
    odd = np.stack([row[lane] & LOW, np.full_like(call, component.tag)]).astype(np.uint32)
    even_out, odd_out = philox4x32_numpy(even, odd, key)
    words = np.stack([even_out[0], odd_out[0], even_out[1], odd_out[1]], 1)
    wanted = 4 * (call[:, None] - 1) + np.arange(4) < count[lane][:, None]
    return np.repeat(lane, wanted.sum(1)), words[wanted]


def _locate(
    component: Component,
    bits: int,
    lane: np.ndarray,
    word: np.ndarray,
    grid: _Grid,
    offset: int,
    elements: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Flat element index and bit of each hit inside the window and the component's mask."""
    position = word & _POSITION
    in_tile = (position >> np.uint32(_SHIFT[bits])).astype(np.int64)
    bit = np.left_shift(np.uint32(1), position & np.uint32(bits - 1))
    keep = None
    if component.mask != LOW:
        keep = (bit & np.uint32(component.mask & ((1 << bits) - 1))) != 0
    per_tile = 1 << (TILE_BITS_LOG2 - _SHIFT[bits])
    if offset or elements % per_tile:  # only then can a hit fall outside
        in_row = in_tile + ((grid.tile * per_tile)[lane] + offset)
        inside = (in_row >= 0) & (in_row < elements)
        keep = inside if keep is None else keep & inside
    index = in_tile + grid.start[lane]
    if offset:
        index += offset
    bit = bit.astype(_UNSIGNED[bits], copy=False)
    return (index, bit) if keep is None else (index[keep], bit[keep])


@lru_cache(maxsize=256)
def _thresholds(component: Component) -> np.ndarray:
    return np.array(component.thresholds, np.uint64)


def _flip_dense(x: np.ndarray, plan: FlipPlan, window: Window) -> None:
    """XOR the dense part into `x` [rows, elements], a block of rows and calls at a time."""
    per_call = 4 * (32 // plan.bits)  # elements that one call covers
    first, last = window.first_element, window.first_element + window.elements
    call0, call1 = first // per_call, -(-last // per_call)
    columns = min(call1 - call0, _CALLS)
    step = max(1, _CALLS // columns)
    for row in range(0, window.rows, step):
        rows = min(step, window.rows - row)
        for call in range(call0, call1, columns):
            mask = _dense_mask(plan, window.key, window.first_row + row, rows, call, min(columns, call1 - call))
            low, high = max(first, call * per_call), min(last, (call + columns) * per_call)
            part = mask.view(x.dtype)[:, low - call * per_call : high - call * per_call]
            x[row : row + rows, low - first : high - first] ^= part


def _dense_mask(plan: FlipPlan, key: int, row: int, rows: int, call: int, calls: int) -> np.ndarray:
    """uint32 [rows, 4 * calls]: the dense mask of the words 4 * call and on, calls counted over the whole row."""
    tile, within = np.divmod(np.arange(call, call + calls), TILE_WORDS // 4)
    template = np.empty((2, rows, calls), np.uint64)
    template[0], template[1] = tile & LOW, within
    odd = np.empty((2, rows, calls), np.uint32)
    odd[0] = ((row + np.arange(rows)) & LOW)[:, None]
    mask = np.zeros((4, rows * calls), np.uint32)
    for step, digit in enumerate(plan.dense):
        odd[1] = DENSE_TAG + step
        even_out, odd_out = philox4x32_numpy(template.reshape(2, -1).copy(), odd.reshape(2, -1), key)
        for k, random in ((0, even_out[0]), (1, odd_out[0]), (2, even_out[1]), (3, odd_out[1])):
            mask[k] = _majority(mask[k], random, digit)
    return np.ascontiguousarray(mask.reshape(4, rows, calls).transpose(1, 2, 0)).reshape(rows, 4 * calls)


def _majority(mask: np.ndarray, random: np.ndarray, digit: int) -> np.ndarray:
    if digit == 0:
        return mask & random
    if digit == LOW:
        return mask | random
    return (mask & random) | (np.uint32(digit) & (mask | random))
