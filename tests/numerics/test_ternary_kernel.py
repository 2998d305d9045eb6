"""The ternary kernels: exactly the definition under the interpreter, and compiled ahead of time for three targets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline_lib.numerics import ternary_kernel
from tests.numerics.test_flip_kernel import assemble

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"BYTES": "i32", "GROUPS": "i32", "WIDTH": "i32"}
GRIDS = {
    "tensor": {"PER_TENSOR": True, "GROUPED": False},
    "row": {"PER_TENSOR": False, "GROUPED": False},
    "group": {"PER_TENSOR": False, "GROUPED": True},
}
KERNELS: dict[str, tuple[Any, str, list[str], dict[str, int]]] = {
    "forward": (ternary_kernel._forward_kernel, "x y", ["M", "N", "K"], {"BM": 64, "BN": 64, "BB": 32}),
    "row": (ternary_kernel._row_kernel, "x y", ["N", "K"], {"BN": 16, "BB": 64}),
    "gradient": (
        ternary_kernel._gradient_kernel, "g out", ["M", "N", "K"], {"DIGIT": 2, "BM": 64, "BN": 32, "BB": 64},
    ),
}  # fmt: skip


def test_the_kernels_equal_the_definition() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    run = [sys.executable, "-m", "tests.numerics.ternary_kernel_cases"]
    done = subprocess.run(run, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "24 cases equal" in done.stdout


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(("dtype", "grid", "codes"), [("fp16", "tensor", 5), ("bf16", "group", 5), ("fp32", "row", 4)])
@pytest.mark.parametrize("name", KERNELS)
def test_the_kernels_compile_ahead_of_time(name: str, dtype: str, grid: str, codes: int, capability: int) -> None:
    kernel, floats, sizes, blocks = KERNELS[name]
    first, last = floats.split()
    types = {first: f"*{dtype}", "packed": "*u8", "scale": "*fp32", last: f"*{dtype}"}
    types |= dict.fromkeys(sizes, "i32") | SIZES
    assembly = assemble(kernel, types, {**GRIDS[grid], "D": codes, **blocks}, capability)
    if name != "row" and dtype != "fp32":
        assert "mma" in assembly["ptx"], "tensor cores are used"


if torch.cuda.is_available():  # elsewhere the interpreter covers the values

    @pytest.mark.parametrize("rows", [1, 3, 64, 200])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_cuda_equals_cpu(dtype: torch.dtype, rows: int) -> None:
        from pipeline_lib.numerics.ternary_linear import dequantise, ternary_linear
        from pipeline_lib.numerics.trits import pack_codes, quantise

        codes, scale = quantise(torch.randn(130, 333))
        packed = pack_codes(codes)
        weight = dequantise(packed, scale, 333, "trits", None)
        x = torch.randn(rows, 333).to(dtype)
        leaf = x.cuda().requires_grad_()
        y = ternary_linear(leaf, packed.cuda(), scale.cuda(), 333)
        y.sum().backward()
        tolerance = {"rtol": 2e-2, "atol": 0.2} if dtype != torch.float32 else {"rtol": 1e-4, "atol": 1e-3}
        torch.testing.assert_close(y.detach().cpu().float(), x.float() @ weight.t(), **tolerance)
        assert leaf.grad is not None
        wanted = weight.sum(0).expand(rows, -1)
        torch.testing.assert_close(leaf.grad.cpu().float(), wanted, **tolerance)
