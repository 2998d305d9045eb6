"""The Triton kernel: bit for bit the reference under the interpreter, and compiled ahead of time for three targets."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource, compile
from triton.runtime.jit import JITFunction, create_function_from_signature

from pipeline_lib.numerics import flip_kernel, flip_triton
from pipeline_lib.numerics.bitflips import flip, flip_, plan_for
from pipeline_lib.numerics.flip_kernel import _flip_kernel, _step_key_kernel, _tables
from pipeline_lib.numerics.flip_plan import TILE_WORDS, FlipPlan
from pipeline_lib.numerics.streams import site_key, step_key

ROOT = Path(__file__).resolve().parents[2]
POINTERS = {8: "*i8", 16: "*i16", 32: "*i32"}


def test_the_kernel_equals_the_reference_bit_for_bit() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    run = [sys.executable, "-m", "tests.numerics.flip_kernel_cases"]
    done = subprocess.run(run, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "cases equal" in done.stdout


def flip_assembly(capability: int, plan: FlipPlan, gate: int, strided: bool) -> dict[str, str]:
    """The forms of the flip kernel as it is launched on rows of a multiple of 16 elements."""
    tables = _tables(plan, torch.device("cpu"))
    x = POINTERS[plan.bits]
    types = {"x": x, "out": x, "words": "*i32", "gradient": x}
    types |= dict.fromkeys(("key", "first_row", "first_element"), "*i64")
    types |= {"elements": "i32"} | dict.fromkeys(("tiles", "n1", "n2", "s_row", "s0", "s1", "s2"), "i32")
    types |= {"gate": "i32", "constant": "i32", "digits": "*i32", "table": "*i64"}
    types |= {"bases": "*i32", "lengths": "*i32", "masks": "*i64"}
    fixed = {name: tables[name] for name in ("K", "COMPONENTS", "LENGTH", "BITS")}
    fixed |= {"COPY": True, "GATE": gate, "STRIDED": strided, "Q": 128, "TW": TILE_WORDS}
    names = list(types)
    divisible = {(names.index(name),): [["tt.divisibility", 16]] for name in ("x", "out", "gradient", "elements")}
    return assemble(_flip_kernel, types, fixed, capability, divisible)


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(
    ("dtype", "p", "p_frac", "gate", "strided"),
    [
        (torch.float32, 2**-10, None, 2, False),
        (torch.bfloat16, 0.25, 0.01, 1, False),
        (torch.float16, 0.5, None, 2, False),
        (torch.bfloat16, 2**-16, None, 0, False),
        (torch.bfloat16, 2**-16, None, 1, True),
        (torch.int8, 0.001, None, 0, False),
    ],
)
def test_the_kernel_compiles_ahead_of_time(
    capability: int, dtype: torch.dtype, p: float, p_frac: float | None, gate: int, strided: bool
) -> None:
    ptx = flip_assembly(capability, plan_for(dtype, p, None, p_frac), gate, strided)["ptx"]
    assert bool(re.search(r"\b(atom|red)\.\S*xor", ptx)) == (p != 0.5), "hits are toggled by atomic XOR"
    if not strided:  # 128 bits at a time
        assert "ld.global.v4.b32" in ptx and "st.global.v4.b32" in ptx


def specialisation(plan: FlipPlan, x: Tensor, monkeypatch: pytest.MonkeyPatch, stream: int = 0, **places: int) -> str:
    """What Triton would compile a launch for: its types, constants, and what it knows of its arguments."""
    backend = CUDABackend(GPUTarget("cuda", 90, 32))
    seen: list[str] = []

    def record(*arguments: Any, **named: Any) -> None:
        function = _flip_kernel
        binder = create_function_from_signature(function.signature, function.params, backend)
        seen.append(str(binder(*arguments, **named)[1]))

    class Launcher:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return record

    keys = torch.arange(9) + places.get("key", 0)  # keys of several streams lie side by side
    where = [torch.tensor(places.get(name, 0)) for name in ("row", "element")]
    with monkeypatch.context() as patch:
        patch.setattr(flip_kernel, "_flip_kernel", Launcher())
        flip_kernel.flip_into_new(x, keys[stream], *where, plan, 0x3F80)
    assert len(seen) == 1, "one launch for all groups of bits, copy and gate"
    return seen[0]


def test_steps_streams_and_sizes_share_one_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_for(torch.bfloat16, 1e-3)
    x = torch.zeros(4, 64, 48, dtype=torch.bfloat16)
    first = specialisation(plan, x, monkeypatch)
    for stream in (1, 2, 3):
        assert specialisation(plan, x, monkeypatch, stream) == first
    for step in (1, 16, 2**40):
        assert specialisation(plan, x, monkeypatch, key=step, row=step, element=step) == first
    for rows, positions in [(1, 1), (3, 7), (16, 64), (1, 10_000)]:
        assert specialisation(plan, x.new_zeros(rows, positions, 48), monkeypatch) == first
    # What is compiled anew, once each: another kind of plan, a strided input, rows that are no multiple of 16.
    other = plan_for(torch.bfloat16, 0.0, 0.3, 1e-4)
    assert specialisation(other, x, monkeypatch) != first
    assert specialisation(plan, x.transpose(1, 2), monkeypatch) != first
    assert specialisation(plan, x.new_zeros(2, 15), monkeypatch) != first


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_the_key_kernel_compiles_ahead_of_time(capability: int) -> None:
    assemble(_step_key_kernel, {"out": "*i64", "step": "*i64", "site_key": "i64", "tag": "i32"}, {}, capability)


def assemble(
    kernel: object, types: dict[str, str], fixed: dict[str, Any], capability: int, attributes: dict | None = None
) -> dict[str, str]:
    """The forms of a kernel for a compute capability, machine code among them."""
    signature = {**types, **dict.fromkeys(fixed, "constexpr")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=fixed, attrs=attributes)
    compiled = compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})
    assert len(compiled.asm["cubin"]) > 1000
    return compiled.asm


def test_no_function_of_a_kernel_has_a_default() -> None:
    """Triton 3.6, the oldest allowed and what torch 2.11 brings, fails to compile one that is a text."""
    functions = [found for found in vars(flip_triton).values() if isinstance(found, JITFunction)]
    assert len(functions) > 5
    for function in functions:
        assert all(own.default is inspect.Parameter.empty for own in function.signature.parameters.values()), function


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
