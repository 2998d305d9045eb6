"""Run by test_flip_kernel under Triton's interpreter: the kernel against the reference, bit for bit."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline_lib.numerics import flip_kernel, flip_triton
from pipeline_lib.numerics.bitflips import flip, make_plan, plan_for
from pipeline_lib.numerics.flip_plan import FlipPlan
from pipeline_lib.numerics.streams import _STEP_TAG, site_key, step_key

KEY = torch.tensor(site_key(4, "site", "input"))
SIGNED = {8: torch.int8, 16: torch.int16, 32: torch.int32}

# name: (plan, shape, first row, first element)
CASES: dict[str, tuple[FlipPlan, tuple[int, ...], int, int]] = {
    "fp32 half": (plan_for(torch.float32, 0.5), (1, 5000), 0, 0),
    "fp32 dense and sparse": (plan_for(torch.float32, 0.3), (1, 4100), 3, 0),
    "bf16 dense, two groups": (plan_for(torch.bfloat16, 0, 0.25, 0.02), (2, 4, 1025), 2**32 - 1, 8191),
    "bf16 two components": (plan_for(torch.bfloat16, 0, 1e-4, 2**-10), (3, 3001), 7, 12_345),
    "fp16 above a half": (plan_for(torch.float16, 0, 0.75, 1.0), (2, 257), 0, 0),
    "fp32 sparse": (plan_for(torch.float32, 1e-3), (2, 3, 2000), 5, 0),
    "fp32 rare": (plan_for(torch.float32, 2**-16), (3, 9000), 0, 4096 * 2**20 + 3),
    "fp32 far": (plan_for(torch.float32, 0.01), (1, 600), 2**40, 2**46 + 4000),
    "one row of one element": (plan_for(torch.bfloat16, 0.5), (1, 1), 0, 1),
    "bytes, odd rows": (make_plan(8, [(0x0F, 0.0001), (0x70, 0.003), (0x80, 0.25)]), (3, 3333), 1, 77),
    "words, lowest bit always": (make_plan(32, [(1, 1.0), (2, 0.125)]), (2, 4097), 0, 0),
    "four groups of 16 bits": (make_plan(16, [(0xF << 4 * i, 2.0**-i / 300) for i in range(4)]), (1, 8200), 0, 0),
}


def check(name: str, plan: FlipPlan, x: Tensor, row: int, element: int) -> None:
    """Out of place and in place, and back again; the number of calls at a time changes no bit."""
    expected = flip(x, plan, KEY, row, element)
    where = (KEY, torch.tensor(row), torch.tensor(element), plan)
    assert not torch.equal(expected, x), f"{name}: nothing flips, so nothing is tested"
    found = flip_kernel.flip_into_new(x, *where)
    assert torch.equal(found, expected), name
    assert not found._is_view(), "autograd lets nobody write to a view that a Function returns"
    if x.numel() * x.element_size() % 4 == 0 and x.numel() < 5000:
        y = x.clone()
        for wanted, calls in ((expected, 32), (x, 512)):
            flip_kernel.launch(y, y, y.view(-1).view(torch.int32), *where, calls=calls)
            assert torch.equal(y, wanted), f"{name}, in place"


def check_gate(name: str, plan: FlipPlan, x: Tensor, row: int, element: int) -> None:
    """Forward (of a strided input) and backward of the gate, on what a float's bits are ordered like."""
    if plan.bits == 8:
        return
    gate = {16: 0x3F90, 32: 0x3F900000}[plan.bits]
    where = (KEY, torch.tensor(row), torch.tensor(element), plan)
    gradient = torch.randint_like(x, 1, 100)
    flipped = flip(x, plan, KEY, row, element)
    kept = (flipped & torch.iinfo(x.dtype).max) < gate
    assert x.numel() < 100 or (kept.any() and not kept.all())
    forward = flip_kernel.flip_into_new(strided(x), *where, gate)
    assert torch.equal(forward, torch.where(kept, flipped, 0)), f"{name}, gated"
    backward = flip_kernel.flip_into_new(x, *where, gate, gradient)
    assert torch.equal(backward, torch.where(kept, gradient, 0)), f"{name}, gradient"


def strided(x: Tensor) -> Tensor:
    """The values of `x` in memory of another order, with gaps."""
    wide = torch.zeros(*x.shape[1:], 2 * x.shape[0], dtype=x.dtype).movedim(-1, 0)[::2]
    wide.copy_(x)
    assert x.numel() == 1 or not wide.is_contiguous()
    return wide


def check_strides() -> None:
    """Views of up to four dimensions are read where they lie; more are copied first."""
    plan = plan_for(torch.bfloat16, 0.002, 1.0)
    base = torch.arange(2 * 3 * 4 * 5 * 6 * 7, dtype=torch.int16).view(2, 3, 4, 5, 6, 7)
    views = [base[:, 0, 0].permute(0, 2, 1, 3), base[:, 0, 0].permute(3, 2, 1, 0), base[:, :, 1, 1].expand(2, 3, 6, 7)]
    views += [base[:1, 0, 0].expand(3, 5, 6, 7), base[:, :, 0, 0, 0, 0], base[..., 0], base.permute(0, 2, 1, 4, 3, 5)]
    zero = torch.tensor(0)
    for view in views:
        expected = flip(view, plan, KEY, 0, 9)
        assert torch.equal(flip_kernel.flip_into_new(view, KEY, zero, zero + 9, plan), expected)
        assert not torch.equal(view, expected)
    view, gradient = views[0], torch.ones_like(views[0])
    kept = (flip(view, plan, KEY) & 0x7FFF) < 0x7F90
    assert kept.any() and not kept.all()
    assert torch.equal(flip_kernel.flip_into_new(view, KEY, zero, zero, plan, 0x7F90, gradient), kept.to(torch.int16))
    assert flip_kernel._strides(views[-1]) is None
    assert flip_kernel._strides(base[:, ::2]) == (2, 840, 2520, 0, 1680, 1)
    far = torch.empty_strided((2**20, 2**14, 3), (2**40, 2**24, 5), device="meta")
    assert flip_kernel._strides(far) == (2**14, 3, 2**40, 0, 2**24, 5)


@triton.jit
def _places(out, program, tiles, elements, start, TE: tl.constexpr):
    row, tile, low, high, first = flip_triton._tile_of(tl.load(program), tiles, elements, tl.load(start), TE)
    tl.store(out, row)
    tl.store(out + 1, tile)
    tl.store(out + 2, low)
    tl.store(out + 3, high)
    tl.store(out + 4, first)


def check_places() -> None:
    """Where a program works, at indices beyond 2^31 and 2^32, against Python's integers; nothing is allocated."""
    out, largest = torch.empty(5, dtype=torch.int64), 0
    for rows, elements, start in [(3, 2**33 + 77, 0), (2**20, 2**24 + 1, 2**35 + 12_345), (1, 2**31 + 8, 8191)]:
        tiles = -(-elements // 8192) + 1
        for program in (0, 1, tiles - 1, tiles, rows * tiles // 2, rows * tiles - 2, rows * tiles - 1):
            if program >= 2**31:  # more than a grid has
                continue
            _places[(1,)](out, torch.tensor(program, dtype=torch.int32), tiles, elements, torch.tensor(start), 8192)
            row, tile = program // tiles, start // 8192 + program % tiles
            before = tile * 8192 - start
            expected = [row, tile, max(-before, 0), min(elements - before, 8192), row * elements + before]
            assert out.tolist() == expected, (rows, elements, start, program)
            largest = max(largest, expected[-1] + expected[3])
    assert largest > 2**34


def main() -> None:
    """All cases."""
    torch.manual_seed(0)
    for name, (plan, shape, row, element) in CASES.items():
        x = torch.randint(-(2 ** (plan.bits - 1)), 2 ** (plan.bits - 1), shape).to(SIGNED[plan.bits])
        check(name, plan, x, row, element)
        check_gate(name, plan, x, row, element)
    check_strides()
    check_places()
    for step in (0, 1, 2**31, 2**40 + 5):
        out = torch.empty((), dtype=torch.int64)
        for site in (site_key(0, "a", "b"), 1, -1):
            flip_kernel._step_key_kernel[(1,)](out, torch.tensor(step), site, _STEP_TAG)
            assert out == step_key(site, torch.tensor(step))
    print(f"{len(CASES)} cases equal")


if __name__ == "__main__":
    main()
