"""Run by test_kernel under Triton's interpreter: the kernel against the definition.

Steps of the operands' levels are powers of two and sums small, so every sum is exact, in any order: equal means equal.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from pipeline_lib.transforms.base import Draw
from pipeline_lib.transforms.optical import kernel
from pipeline_lib.transforms.optical.product import How, reference

RANGES = {
    "known": [[-8.0, 7.0], [-4.0, 3.5], [-30.5, 41.25]],
    "above zero": [[1.0, 16.0], [0.5, 8.0], [3.0, 900.0]],  # zero, beyond the end of the sum, is no level
    "unknown": [[math.inf, -math.inf]] * 3,
    "no width": [[-8.0, 7.0], [0.5, 0.5], [2.0, 2.0]],
}
LINEAR = [((2, 5, 37), (23, 37)), ((3, 16), (8, 16)), ((1, 65, 33), (70, 33)), ((1, 2, 2, 8), (4, 8))]
BATCHED = [((2, 3, 7, 19), (2, 3, 19, 11)), ((1, 2, 33, 40), (1, 2, 40, 65)), ((2, 4, 5), (2, 5, 9))]
BLOCKS = {"BM": 32, "BN": 32, "BK": 16}


def case(
    shapes: tuple[tuple[int, ...], tuple[int, ...]],
    name: str,
    dtype: torch.dtype,
    dither: bool,
    lut: bool,
    slack: float,
) -> None:
    left, right = (torch.randint(-40, 40, shape).to(dtype) / 4 for shape in shapes)
    linear = left.ndim != right.ndim or right.ndim == 2
    if not linear and left.ndim == 4:
        right = right.mT.contiguous().mT  # as keys come
    ranges, knobs = torch.tensor(RANGES[name]), torch.tensor([15.0, 99.0, slack])
    strides = (1, left.shape[1]) if not linear and left.ndim == 4 else (1,) * (left.ndim - 2)
    strides = (left.shape[2], 1) if linear and left.ndim == 4 else strides
    where = Draw(torch.tensor(2**62 + 5), torch.tensor(2**32 - 1), torch.tensor(70), strides=strides)
    draw, lut_min = where if dither else None, 0.125 if lut else None
    gate = not dither
    expected = reference(left, right, ranges, knobs, draw, How(linear, lut_min, gate, None, True, False))
    y, seen, outside = kernel.launch(
        left, right, ranges, knobs, draw,
        linear=linear, lut_min=lut_min, gate=gate, observe=True, eased=slack != 0, blocks=BLOCKS,
    )  # fmt: skip
    assert y.dtype == dtype and y.shape == expected[0].shape
    if slack == 0:
        # The interpreter cuts bf16 off where a GPU rounds it: a unit in the last place of the stored result.
        rtol = 2**-7 if dtype == torch.bfloat16 else 0
        torch.testing.assert_close(y, expected[0], rtol=rtol, atol=0)
        assert torch.equal(seen, expected[1][2]), (shapes, name)
        assert not gate or torch.equal(outside, expected[2])
    else:
        torch.testing.assert_close(y, expected[0], rtol=1e-5, atol=1e-4)


def not_a_number() -> None:
    """One NaN among the operands is passed on, and what was seen is not finite: `settle` moves no range by it."""
    left, right = torch.ones(2, 5, 37), torch.ones(23, 37)
    left[1, 2, 3] = math.nan
    ranges, knobs = torch.tensor(RANGES["known"]), torch.tensor([15.0, 99.0, 0.0])
    expected, reach, _ = reference(left, right, ranges, knobs, None, How(True, None, False, None, True, False))
    y, seen, _ = kernel.launch(
        left, right, ranges, knobs, None,
        linear=True, lut_min=None, gate=False, observe=True, eased=False, blocks=BLOCKS,
    )  # fmt: skip
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    assert not seen.isfinite().all() and not reach[2].isfinite().all()
    y, *_ = kernel.launch(
        left[:0], right, ranges, knobs, None,
        linear=True, lut_min=None, gate=False, observe=True, eased=False, blocks=BLOCKS,
    )  # fmt: skip
    assert y.shape == (0, 5, 23)


def mend_the_interpreter() -> None:
    """Triton 3.7's interpreter holds bf16 as 16-bit integers, and multiplies those."""
    exact = InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        wide = [
            TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32) if x.dtype == tl.bfloat16 else x
            for x in (a, b)
        ]
        return exact(self, *wide, *rest)

    InterpreterBuilder.create_dot = create_dot


def main() -> None:
    mend_the_interpreter()
    torch.manual_seed(0)
    count = 0
    ordinary = itertools.product(LINEAR + BATCHED, ("known", "above zero"), (True, False))
    degenerate = itertools.product((LINEAR[1], BATCHED[2]), ("unknown", "no width"), (True, False))
    for shapes, name, dither in itertools.chain(ordinary, degenerate):
        case(shapes, name, torch.float32, dither, dither, 0.0)
        count += 1
    for shapes, dtype in itertools.product((LINEAR[0], BATCHED[0]), (torch.bfloat16, torch.float16)):
        for dither in (True, False):
            case(shapes, "known", dtype, dither, True, 0.0)
            count += 1
    for shapes in (LINEAR[0], BATCHED[0]):
        case(shapes, "known", torch.float32, True, True, 0.375)
        count += 1
    not_a_number()
    print(f"{count} cases equal")


if __name__ == "__main__":
    main()
