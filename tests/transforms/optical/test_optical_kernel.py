"""The kernel: the definition under the interpreter, and compiled ahead of time for three targets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline_lib.transforms.optical import kernel
from pipeline_lib.transforms.optical.grid import TAG
from tests.numerics.test_flip_kernel import assemble

ROOT = Path(__file__).resolve().parents[3]
NUMBERS = ("heads", "first", "second", "M", "N", "K", "s_az", "s_am", "s_ak", "s_bz", "s_bk", "s_bn")


def test_the_kernel_equals_the_definition() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    run = [sys.executable, "-m", "tests.transforms.optical.kernel_cases"]
    done = subprocess.run(run, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "46 cases equal" in done.stdout


@pytest.mark.parametrize(
    ("dtype", "linear", "eased", "capability"),
    [("bf16", True, False, 80), ("bf16", True, False, 90), ("bf16", True, False, 100), ("fp16", False, False, 90),
     ("fp32", False, True, 80)],
)  # fmt: skip
def test_the_kernel_compiles_ahead_of_time(dtype: str, linear: bool, eased: bool, capability: int) -> None:
    types: dict[str, Any] = {"a": f"*{dtype}", "b": f"*{dtype}", "y": f"*{dtype}", "outside": "*i8", "seen": "*fp32"}
    types |= {"ranges": "*fp32", "knobs": "*fp32", "key": "*i64", "first_row": "*i64", "first_vector": "*i64"}
    types |= {"lut_min": "fp32", **dict.fromkeys(NUMBERS, "i32")}
    fixed = {"LINEAR": linear, "DITHER": True, "LUT": True, "SLACK": eased, "OBSERVE": True, "GATE": eased, "TAG": TAG}
    assembly = assemble(kernel._product_kernel, types, {**fixed, **kernel.BLOCKS}, capability)
    ptx = assembly["ptx"]
    assert "atom" in ptx or "red" in ptx, "the extremes of the result"
    if dtype != "fp32":
        assert "mma" in ptx, "tensor cores are used"


def test_triton_is_imported_only_where_it_is_used() -> None:
    code = (
        "import sys; from pipeline_lib.transforms.optical import product\n"
        "sys.exit('pipeline_lib.transforms.optical.kernel' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


if torch.cuda.is_available():  # elsewhere the interpreter covers the values

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("shapes", [((3, 65, 130), (90, 130)), ((2, 3, 70, 40), (2, 3, 40, 70))])
    def test_cuda_equals_cpu(dtype: torch.dtype, shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
        from pipeline_lib.transforms.base import Draw
        from pipeline_lib.transforms.optical.product import How, product

        torch.manual_seed(0)
        found = []
        left, right = (torch.randint(-40, 40, shape).to(dtype) / 4 for shape in shapes)
        for device in ("cpu", "cuda"):
            ranges = torch.tensor([[-8.0, 7.0], [-4.0, 3.5], [-30.5, 41.25]], device=device)
            numbers = (torch.tensor(value, device=device) for value in (2**62 + 5, 3, 70))
            draw = Draw(*numbers, strides=(1,) if len(shapes[0]) == 3 else (1, 3))
            a, b = (tensor.to(device).requires_grad_() for tensor in (left, right))
            how = How(len(shapes[1]) == 2, 0.125, True, None, True, False)
            y, seen = product(a, b, ranges, torch.tensor([15.0, 99.0, 0.0], device=device), draw, how)
            y.float().square().sum().backward()
            found.append([tensor.detach().cpu().float() for tensor in (y, seen, a.grad, b.grad)])  # type: ignore[union-attr]
        for one, two in zip(*found, strict=True):
            torch.testing.assert_close(one, two, rtol=2e-2, atol=1e-3 * float(one.abs().max().clamp(max=1e6)))
        assert torch.equal(found[0][0], found[1][0])
        assert torch.equal(found[0][1], found[1][1])
