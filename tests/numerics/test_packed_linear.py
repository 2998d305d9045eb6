"""The packed product: every way of computing it against the definition, and the kernels compiled for three targets."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from pipeline_lib.numerics import packed_cpu
from pipeline_lib.numerics.packed_kernel import _row_kernel, _tile_kernel, launch_for
from pipeline_lib.numerics.packed_linear import MOST_ROWS_ON_CPU, decoded, packed_linear, reference, whole_words
from tests.numerics.packed_weights import TOLERANCES, packed_weight
from tests.numerics.test_flip_kernel import ROOT, assemble

FLOATS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}


def test_the_kernels_agree_with_the_definition() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    run = [sys.executable, "-m", "tests.numerics.packed_kernel_cases"]
    done = subprocess.run(run, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "cases agree" in done.stdout


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtype", list(FLOATS))
@pytest.mark.parametrize(("rows", "bits"), [(1, 2), (8, 2), (256, 2), (1, 8), (8, 4)])
def test_the_kernels_compile_ahead_of_time(capability: int, dtype: torch.dtype, rows: int, bits: int) -> None:
    how = launch_for(rows, 2048, 2048, bits, 108)
    float_pointers = {"x": FLOATS[dtype], "scale": "*fp16", "bias": FLOATS[dtype]}
    out = FLOATS[dtype] if how.parts == 1 else "*fp32"
    types = {**float_pointers, "words": "*i32", "zero": "*u8", "out": out, "N": "i32", "K": "i32", "GROUP": "i32"}
    types |= {"groups": "i32"}
    if how.block_m == 1:
        fixed = {"HAS_BIAS": False, "BITS": bits, "BLOCK_N": how.block_n, "BLOCK_W": how.block_k * bits // 32}
        assemble(_row_kernel, types, fixed, capability)
        return
    types |= {"M": "i32", "span": "i32"}
    fixed = {"HAS_BIAS": False, "BITS": bits, "PRECISION": "ieee", "WIDEN": False}
    fixed |= {"BLOCK_M": how.block_m, "BLOCK_N": how.block_n, "BLOCK_K": how.block_k}
    assembly = assemble(_tile_kernel, types, fixed, capability)
    if dtype != torch.float32:
        assert "mma" in assembly["ptx"], "the product runs on tensor cores"


@pytest.mark.parametrize("rows", [1, 3, MOST_ROWS_ON_CPU, MOST_ROWS_ON_CPU + 1])
@pytest.mark.parametrize(
    ("out", "features", "group", "bits"),
    [(32, 32, 32, 2), (96, 160, 64, 2), (33, 1056, 128, 2), (7, 48, 16, 2), (64, 96, 128, 2), (10, 33, 8, 2),
     (16, 64, 32, 4), (16, 64, 32, 8), (5, 130, 7, 2)],
)  # fmt: skip
def test_on_a_cpu_it_agrees_with_the_definition(rows: int, out: int, features: int, group: int, bits: int) -> None:
    """Every shape, those that no kernel takes included."""
    torch.manual_seed(rows)
    weight, bias = packed_weight(out, features, group, bits), torch.randn(out)
    for dtype, tolerance in TOLERANCES.items():
        x = torch.randn(2, rows, features).to(dtype)[:, :rows]
        expected = reference(x.double(), *weight, bias.double(), bits, group)
        got = packed_linear(x, *weight, bias.to(dtype), bits, group)
        assert (got.shape, got.dtype) == ((2, rows, out), dtype)
        assert (got.double() - expected).abs().max() <= tolerance * expected.abs().max()


def test_the_compiled_loop_is_what_few_rows_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a compiler decodes the weight and says so; the answer is the same."""
    assert packed_cpu.available(), "this machine has a C compiler"
    weight, x, calls = packed_weight(64, 128, 64, 2), torch.randn(1, 128), []
    loop = packed_cpu.packed_linear
    monkeypatch.setattr(packed_cpu, "packed_linear", lambda *given: calls.append(1) or loop(*given))
    fast = packed_linear(x, *weight, None, 2, 64)
    assert calls == [1]
    monkeypatch.setenv("CC", "no-such-compiler")
    packed_cpu.available.cache_clear()
    packed_cpu._library.cache_clear()
    try:
        with pytest.warns(UserWarning, match="decoded at each use"):
            slow = packed_linear(x, *weight, None, 2, 64)
    finally:
        packed_cpu.available.cache_clear()
        packed_cpu._library.cache_clear()
    assert calls == [1]
    assert torch.allclose(fast, slow, rtol=1e-5, atol=1e-5)


def test_two_threads_give_the_bits_of_one() -> None:
    weight, x = packed_weight(1026, 2048, 128, 2), torch.randn(3, 2048)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(packed_linear(x, *weight, None, 2, 128))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_the_definition_by_hand() -> None:
    weight = packed_weight(3, 10, 4, 2, seed=5)
    codes, scale, zero = weight
    for n in range(3):
        for k in range(10):
            code = int(codes[n, k // 4]) >> (2 * (k % 4)) & 3
            z = int(zero[n, 0]) >> (2 * (k // 4)) & 3
            assert decoded(*weight, 2, 4, 10)[n, k] == (code - z) * float(scale[n, k // 4])


def test_the_operator_compiles_and_has_a_fake() -> None:
    weight, x = packed_weight(32, 64, 32, 2), torch.randn(2, 5, 64)
    torch.library.opcheck(torch.ops.errata.packed_linear.default, (x, *weight, None, 2, 32))
    compiled = torch.compile(lambda x: packed_linear(x, *weight, None, 2, 32) + 1, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), packed_linear(x, *weight, None, 2, 32) + 1)
    codes, scale, zero = (t.to("meta") for t in weight)
    assert packed_linear(x.to("meta"), codes, scale, zero, None, 2, 32).shape == (2, 5, 32)


@pytest.mark.parametrize(
    ("features", "bits", "group", "whole"), [(32, 2, 32, True), (33, 2, 32, False), (48, 2, 16, True), (64, 2, 8, False),
                                            (96, 2, 96, True), (96, 2, 128, True), (8, 4, 8, True), (4, 8, 4, True)],
)  # fmt: skip
def test_which_shapes_have_kernels(features: int, bits: int, group: int, whole: bool) -> None:
    assert whole_words(features, bits, group) is whole


if torch.cuda.is_available():  # elsewhere the interpreter covers them

    @pytest.mark.parametrize("dtype", list(TOLERANCES))
    @pytest.mark.parametrize("rows", [1, 2, 16, 17, 64, 300])
    @pytest.mark.parametrize(("out", "features"), [(2048, 2048), (512, 2048), (8192, 2048), (2048, 8192), (96, 160)])
    def test_on_cuda(dtype: torch.dtype, rows: int, out: int, features: int) -> None:
        weight = packed_weight(out, features, 32, 2)
        x = torch.randn(rows, features).to(dtype)
        expected = reference(x.double(), *weight, None, 2, 32)
        codes, scale, zero = (t.cuda() for t in weight)
        got = packed_linear(x.cuda(), codes, scale, zero, None, 2, 32)
        assert (got.cpu().double() - expected).abs().max() <= TOLERANCES[dtype] * expected.abs().max()
