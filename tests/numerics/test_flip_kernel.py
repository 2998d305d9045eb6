"""The Triton kernel: bit for bit the reference under the interpreter, and compiled ahead of time for three targets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from pipeline_lib.numerics.bitflips import flip, flip_, plan_for
from pipeline_lib.numerics.flip_kernel import _flip_kernel, _step_key_kernel, _tables
from pipeline_lib.numerics.flip_plan import TILE_WORDS
from pipeline_lib.numerics.streams import site_key, step_key

ROOT = Path(__file__).resolve().parents[2]
POINTERS = {8: "*i8", 16: "*i16", 32: "*i32"}


def test_the_kernel_equals_the_reference_bit_for_bit() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    run = [sys.executable, "-m", "tests.numerics.flip_kernel_cases"]
    done = subprocess.run(run, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "cases equal" in done.stdout


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(
    ("dtype", "p", "p_frac"), [(torch.float32, 2**-10, None), (torch.bfloat16, 0.25, 0.01), (torch.int8, 0.001, None)]
)
def test_the_kernel_compiles_ahead_of_time(capability: int, dtype: torch.dtype, p: float, p_frac: float | None) -> None:
    tables = _tables(plan_for(dtype, p, None, p_frac), torch.device("cpu"))
    x = POINTERS[tables["BITS"]]
    types = {"x": x, "out": x, "words": "*i32", "key": "*i64", "first_row": "*i64", "first_element": "*i64"}
    types |= {"elements": "i64", "tiles": "i32", "constant": "i32", "digits": "*i32", "table": "*i64"}
    types |= {"bases": "*i32", "lengths": "*i32", "masks": "*i64"}
    fixed = {name: tables[name] for name in ("K", "COMPONENTS", "LENGTH", "BITS")}
    fixed |= {"COPY": True, "Q": 128, "TW": TILE_WORDS}
    assembly = assemble(_flip_kernel, types, fixed, capability)
    assert "atom" in assembly["ptx"] or "red" in assembly["ptx"]


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_the_key_kernel_compiles_ahead_of_time(capability: int) -> None:
    assemble(_step_key_kernel, {"out": "*i64", "step": "*i64", "site_key": "i64", "tag": "i32"}, {}, capability)


def assemble(kernel: object, types: dict[str, str], fixed: dict[str, int], capability: int) -> dict[str, str]:
    """The forms of a kernel for a compute capability, machine code among them."""
    signature = {**types, **dict.fromkeys(fixed, "constexpr")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=fixed)
    compiled = compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})
    assert len(compiled.asm["cubin"]) > 1000
    return compiled.asm


def test_triton_is_imported_only_where_it_is_used() -> None:
    code = (
        "import sys, torch; from pipeline_lib.numerics import bitflips, streams\n"
        "bitflips.flip(torch.ones(2, 2), bitflips.plan_for(torch.float32, .5), torch.tensor(1), threshold=1.)\n"
        "sys.exit('pipeline_lib.numerics.flip_kernel' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


if torch.cuda.is_available():  # elsewhere the interpreter covers the bits

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("p", [0.5, 0.3, 0.01, 2**-10, 2**-16])
    def test_cuda_equals_cpu(dtype: torch.dtype, p: float) -> None:
        plan = plan_for(dtype, p, p, p / 3)
        x = torch.randn(3, 40, 1001).to(dtype)
        site = site_key(1, "a", "b")
        key, device_key = step_key(site, torch.tensor(9)), step_key(site, torch.tensor(9, device="cuda"))
        assert int(key) == int(device_key)
        in_place = [flip_(x.to(k.device, copy=True), plan, k, 3).cpu().view(torch.int16) for k in (key, device_key)]
        assert torch.equal(*in_place)
        for threshold in (None, 2.0):
            results = []
            for device in ("cpu", "cuda"):
                leaf = x.to(device).requires_grad_()
                y = flip(leaf, plan, key.to(device), 3, 5, threshold=threshold)
                y.nan_to_num().sum().backward()
                assert leaf.grad is not None
                results.append((y.detach().cpu().view(torch.int16), leaf.grad.cpu()))
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
