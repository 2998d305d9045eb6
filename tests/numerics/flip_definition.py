"""The stream's definition once more, word for word in plain Python: slow, and written apart from the reference."""

from __future__ import annotations

import numpy as np

from pipeline_lib.numerics.flip_plan import FlipPlan
from pipeline_lib.numerics.philox import philox4x32_int


def mask_by_definition(plan: FlipPlan, key: int, row: int, tiles: int) -> np.ndarray:
    """uint32 [tiles * 4096]: the mask of the first tiles of a row."""
    k0, k1 = key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF
    mask = np.zeros(tiles * 4096, np.uint32)
    for tile in range(tiles):
        words = [plan.constant] * 4096
        if plan.dense:
            for call in range(1024):
                dense = [0, 0, 0, 0]
                for j, digit in enumerate(plan.dense):
                    random = philox4x32_int(tile, row, call, (2 << 28) + j, k0, k1)
                    dense = [(m & r) | (digit & (m | r)) for m, r in zip(dense, random, strict=True)]
                for k in range(4):
                    words[4 * call + k] ^= dense[k]
        for number, component in enumerate(plan.sparse):
            tag = (number if number < 2 else number + 1) << 28
            low, high, _, _ = philox4x32_int(tile, row, 0, tag, k0, k1)
            count = component.base + sum((high << 32 | low) >= threshold for threshold in component.thresholds)
            for hit in range(count):
                word = philox4x32_int(tile, row, hit // 4 + 1, tag, k0, k1)[hit % 4] & 0x1FFFF
                words[word >> 5] ^= (1 << (word & 31)) & component.mask
        mask[tile * 4096 : (tile + 1) * 4096] = words
    return mask
