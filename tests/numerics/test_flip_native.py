"""The C kernel against the numpy reference, bit for bit; its build, and what happens without a compiler."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline_lib.numerics import flip_cpu, flip_native, flip_source, native
from pipeline_lib.numerics.bitflips import flip_, plan_for
from pipeline_lib.numerics.flip_plan import FlipPlan
from pipeline_lib.numerics.flip_reference import Window, flip_array
from tests.numerics.flip_kernel_cases import CASES, SIGNED

KEY = -(2**62) - 12345


def window(shape: tuple[int, ...], row: int, element: int) -> Window:
    return Window(KEY, row, shape[0], element, int(np.prod(shape[1:])))


def by_reference(x: torch.Tensor, plan: FlipPlan, where: Window) -> torch.Tensor:
    array = x.numpy().reshape(-1).view(f"u{plan.bits // 8}").copy()
    flip_array(array, plan, where)
    return torch.from_numpy(array.view(x.numpy().dtype)).view(x.shape)


@pytest.fixture
def threads() -> Iterator[None]:
    """Small tensors go to three threads, too."""
    before, flip_native._PER_THREAD = flip_native._PER_THREAD, 1
    count = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(count)
    flip_native._PER_THREAD = before


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("threads")
def test_the_kernel_equals_the_reference(name: str) -> None:
    plan, shape, row, element = CASES[name]
    where = window(shape, row, element)
    torch.manual_seed(0)
    x = torch.randint(-(2 ** (plan.bits - 1)), 2 ** (plan.bits - 1), shape).to(SIGNED[plan.bits])
    expected = by_reference(x, plan, where)
    assert not torch.equal(expected, x)
    assert torch.equal(flip_cpu.flipped(x, where, plan, None)[0], expected)
    again = x.clone()
    for wanted in (expected, x):
        flip_cpu.flip_in_place(again, where, plan)
        assert torch.equal(again, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 2**-12, 0.01, 0.3, 0.9, 1.0])
def test_without_a_compiler_numpy_does_all_the_same(
    dtype: torch.dtype, p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    x, grad = (torch.randn(3, 5, 1777).to(dtype) for _ in range(2))
    where = window((3, 5, 1777), 2**33, 8190)
    signed = SIGNED[8 * dtype.itemsize]

    def everything() -> list[torch.Tensor]:
        plan = plan_for(dtype, p)
        place = x.clone()
        flip_cpu.flip_in_place(place, where, plan)
        done = [place, flip_cpu.gated_gradient(grad, x, where, plan, 1.5)]
        for threshold in (None, 0.0, 1.5, 1e30):
            for view in (x, x.transpose(1, 2).contiguous().transpose(1, 2)):
                out, dropped = flip_cpu.flipped(view, where, plan, threshold)
                done += [out, torch.tensor([dropped], dtype=dtype)]
        return [tensor.view(signed) for tensor in done]

    native = everything()
    monkeypatch.setattr(flip_native, "is_available", lambda: False)
    assert all(torch.equal(a, b) for a, b in zip(native, everything(), strict=True))


@pytest.mark.parametrize(("compiler", "words"), [("", "no C compiler was found"), ("no-such-cc", "no-such-cc")])
def test_a_missing_compiler_is_told_once(
    compiler: str, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in {"PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path), "CC": compiler}.items():
        monkeypatch.setenv(name, value)
    flip_native._library.cache_clear()
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for _ in range(3):
                flip_(torch.ones(2, 2), plan_for(torch.float32, 0.5), torch.tensor(1))
    finally:
        flip_native._library.cache_clear()
    [warning] = told
    assert words in str(warning.message)


@pytest.mark.parametrize("flags", [flip_native.FLAGS, ((),), (("--no-such-flag",), ())])
def test_the_build_is_cached_and_clones_change_nothing(
    flags: tuple[tuple[str, ...], ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also without the wide vectors that this processor may have, from a folder that was not there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "new"))
    monkeypatch.setattr(flip_native, "FLAGS", flags)
    path = native.built("flip", flip_native.source(), *flags)
    before = path.stat().st_mtime_ns
    assert native.built("flip", flip_native.source(), *flags) == path
    assert path.stat().st_mtime_ns == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    flip_native._library.cache_clear()
    try:
        test_the_kernel_equals_the_reference("bf16 dense, two groups")
    finally:
        flip_native._library.cache_clear()
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_kernels_run_on_the_threads_of_torch() -> None:
    """Where torch has GNU OpenMP a kernel finds it; else it would run on one thread without a word."""
    if "OpenMP" not in torch.__config__.parallel_info():
        pytest.skip("this torch has no OpenMP")
    code = """
    static void count(void *seen, int64_t begin, int64_t end) { __atomic_fetch_add((int *)seen, 1, __ATOMIC_RELAXED); }
    int parts(int threads) { int seen = 0; in_parallel(count, &seen, 100, threads); return seen; }
    """
    library = native.load("threads-test", code)
    assert [library.parts(threads) for threads in (1, 2, 3)] == [1, 2, 3]


def test_a_mutant_with_nine_rounds_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(flip_source, "C", flip_source.C.replace("round < 10", "round < 9"))
    monkeypatch.setattr(flip_native, "FLAGS", ((),))
    flip_native._library.cache_clear()
    try:
        with pytest.raises(AssertionError):
            test_the_kernel_equals_the_reference("fp32 sparse")
    finally:
        flip_native._library.cache_clear()
