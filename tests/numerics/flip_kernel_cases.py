"""Run by test_flip_kernel under Triton's interpreter: the kernel against the reference, bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline_lib.numerics import flip_kernel
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
    """Out of place and in place, and back again."""
    expected = flip(x, plan, KEY, row, element)
    where = (KEY, torch.tensor(row), torch.tensor(element), plan)
    assert not torch.equal(expected, x), f"{name}: nothing flips, so nothing is tested"
    assert torch.equal(flip_kernel.flip_into_new(x, *where), expected), name
    if x.numel() * x.element_size() % 4 == 0 and x.numel() < 5000:
        y = x.clone()
        for wanted in (expected, x):
            flip_kernel.launch(y, y, y.view(-1).view(torch.int32), *where)
            assert torch.equal(y, wanted), f"{name}, in place"


def main() -> None:
    torch.manual_seed(0)
    for name, (plan, shape, row, element) in CASES.items():
        x = torch.randint(-(2 ** (plan.bits - 1)), 2 ** (plan.bits - 1), shape).to(SIGNED[plan.bits])
        check(name, plan, x, row, element)
    for step in (0, 1, 2**31, 2**40 + 5):
        out = torch.empty((), dtype=torch.int64)
        for site in (site_key(0, "a", "b"), 1, -1):
            flip_kernel._step_key_kernel[(1,)](out, torch.tensor(step), site, _STEP_TAG)
            assert out == step_key(site, torch.tensor(step))
    print(f"{len(CASES)} cases equal")


if __name__ == "__main__":
    main()
