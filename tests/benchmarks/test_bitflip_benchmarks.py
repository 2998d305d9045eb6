"""What the benchmarks of bit flips compute from times, and that they refuse to measure what is not there."""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import bitflip_cpu, bitflip_gpu, report
from pipeline_lib.config.errors import UserError
from pipeline_lib.numerics import flip_kernel


def test_the_cpu_benchmark_compares_like_with_like() -> None:
    x = torch.randn(1 << 14).to(torch.bfloat16)
    flipped = bitflip_cpu.naive(x.view(torch.int16), 0.25) ^ x.view(torch.int16)
    rates = torch.stack([(flipped >> bit & 1).double().mean() for bit in range(16)])
    assert ((rates - 0.25).abs() < 0.02).all()
    [low, half] = bitflip_cpu.measure(1 << 14, 1, 1, (2**-16, 0.5))
    assert set(low) == set(half) >= {"naive ms", "copy ms", "into ms", "flip ms", "in place ms"}
    assert "copy" in low["goal"]
    assert "copy" not in half["goal"]


def test_cpu_ratios_are_taken_within_rounds() -> None:
    seconds = {"naive": [1.0, 9.0, 2.0], "flip": [0.01, 0.03, 0.01], "copy": [1.0, 2.0, 1.0], "into": [2.0, 2.0, 2.0]}
    row = bitflip_cpu.row(2**-16, seconds)
    assert (row["naive / flip"], row["copy / into"]) == (200.0, 0.5)
    assert row["goal"] == "5x naive: met, 0.5x copy: met"
    assert bitflip_cpu.goal(2**-10, 99.0, 1.0) == "100x naive: MISSED"
    assert bitflip_cpu.goal(0.5, 20.0, 0.0) == "20x naive: met"
    assert bitflip_cpu.goal(2**-24, 5.0, 0.49) == "5x naive: met, 0.5x copy: MISSED"


def test_a_disagreement_stops_the_cpu_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bitflip_cpu, "into", lambda x, out, plan: None)
    with pytest.raises(RuntimeError, match="disagree"):
        bitflip_cpu.measure(1 << 14, 1, 1, (0.01,))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
def test_without_a_gpu_nothing_is_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["bitflip_gpu"])
    with pytest.raises(SystemExit, match="torch sees none"):
        bitflip_gpu.main()
    assert not capsys.readouterr().out


@pytest.mark.parametrize("found", [None, "0.0.6"])
def test_without_the_rival_nothing_is_measured(found: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(UserError, match=r"pip install mase-triton==0\.0\.7"):
        bitflip_gpu.rival()


def test_the_rival_runs_only_at_its_own_probabilities() -> None:
    assert [bitflip_gpu.halves(p) for p in (0.5, 2**-16, 2**-24, 0.3, 0.01, 2**-25, 1.0)] == [1, 16, 24] + [None] * 4


def test_gpu_speeds_are_fractions_of_clone() -> None:
    times = {"clone": [1.0, 2.0], "forward": [1.0, 4.0], "in place": [0.5, 1.0], "gated": [2.0, 4.0]}
    times |= {"backward": [4.0, 8.0], "mase-triton": [16.0, 64.0]}
    row = bitflip_gpu.speed_row(1 << 26, 2**-16, times)
    assert (row["forward"], row["in place"], row["gated"], row["backward"]) == (0.75, 2.0, 0.5, 0.25)
    assert row["mase-triton / forward"] == 16.0
    assert row["clone GB/s"] == round(4 * 2**26 / 1.5 / 1e6, 1)
    assert row["goal"] == "forward 0.9: MISSED, in place 1: met, mase-triton / forward 15: met"
    del times["mase-triton"]
    weak = bitflip_gpu.speed_row(1 << 26, 0.01, times)
    assert (weak["mase-triton / forward"], weak["goal"]) == (None, "forward 0.3: met")
    assert bitflip_gpu.speed_row(1 << 20, 0.01, times)["goal"] is None
    assert bitflip_gpu.goal(1 << 28, 0.5, {"forward": 0.79}) == "forward 0.8: MISSED"


def test_steps_state_their_share_of_the_peak() -> None:
    model = bitflip_gpu.sizes_of_config("1.1b")
    rest = model["vocab"] * model["dim"] + model["dim"]
    kv = model["dim"] * model["kv_heads"] // model["heads"]
    block = 2 * model["dim"] ** 2 + 2 * model["dim"] * kv + 3 * model["dim"] * model["ffn"] + 2 * model["dim"]
    expected = 6 * (rest + model["layers"] * block) + 12 * model["layers"] * model["dim"] * 2048
    assert bitflip_gpu.flops_per_token(model, 2048) == expected
    tokens = 1000
    seconds = expected * tokens / (0.4 * bitflip_gpu.PEAK)
    times = {"plain": [seconds * 1e3] * 3, "bitflip": [seconds * 1.2e3] * 3}
    plain, flips = bitflip_gpu.step_rows("1.1b", model, tokens, times)
    assert (plain["MFU"], plain["ratio"], plain["goal"]) == (0.4, 1.0, None)
    assert (flips["ratio"], flips["goal"]) == (1.2, "1.15: MISSED")


def test_the_page_says_what_is_unmeasured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ("unmeasured" in report.page()) == (not (report.FOLDER / "bitflip_gpu.json").exists())
    monkeypatch.setattr(report, "FOLDER", tmp_path)
    assert "unmeasured" in report.page()


@pytest.fixture
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of the GPU's benchmark at a size for a CPU, whose clock and uncompiled models stand in."""
    tiny = {"dim": 32, "layers": 2, "heads": 2, "kv_heads": 1, "ffn": 48, "vocab": 64}
    sizes = bitflip_gpu.sizes_of_config
    monkeypatch.setattr(bitflip_gpu, "DEVICE", "cpu")
    monkeypatch.setattr(bitflip_gpu, "LARGE", 1 << 13)
    monkeypatch.setattr(bitflip_gpu, "SEQUENCE", 16)
    monkeypatch.setattr(bitflip_gpu, "BATCH", {"60m": 2})
    monkeypatch.setattr(bitflip_gpu, "sizes_of_config", lambda name: {**sizes(name), **tiny})
    monkeypatch.setattr(bitflip_gpu, "milliseconds", lambda call: float(call() is None) + 1)
    monkeypatch.setattr(torch, "compile", lambda model: model)


@pytest.mark.usefixtures("on_a_cpu")
def test_the_gpu_benchmark_runs_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[tuple[int, int]] = []

    def launch(
        x: Tensor, out: Tensor, words: Tensor, *places: Any, warps: int = 4, calls: int = 128, **others: Any
    ) -> None:
        bound = inspect.signature(flip_kernel.launch).bind(x, out, words, *places, warps=warps, calls=calls, **others)
        assert words.data_ptr() == out.data_ptr()
        assert (words.dtype, 4 * words.numel()) == (torch.int32, out.numel() * out.element_size())
        assert bound.arguments["plan"].bits == 16
        launched.append((warps, calls))

    real, written = flip_kernel.launch, {}
    monkeypatch.setattr(flip_kernel, "launch", functools.wraps(real)(launch))
    monkeypatch.setattr(bitflip_gpu, "rival", lambda: lambda x, n: x.clone())
    monkeypatch.setattr(bitflip_gpu, "write", lambda name, figures, rows: written.update(figures, rows=rows))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "none")
    monkeypatch.setattr(sys, "argv", ["bitflip_gpu", "--log2-elements", "12", "13", "--rounds", "1"])
    bitflip_gpu.main()
    json.dumps(written)
    assert len(written["rows"]) == 2 * len(bitflip_gpu.PROBABILITIES)
    assert [row["goal"] is None for row in written["rows"][: len(bitflip_gpu.PROBABILITIES)]] == [True] * 11
    assert set(launched) == set(bitflip_gpu.SHAPES)
    assert len(written["launches at p = 0.01"]) == len(bitflip_gpu.SHAPES) == 20
    assert [row["variant"] for row in written["training steps"]] == ["plain", "bitflip", "bitflip, shared input"]


@pytest.mark.usefixtures("on_a_cpu")
@pytest.mark.parametrize("wrong", ["flip", "flip_"])
def test_a_disagreement_stops_the_gpu_benchmark(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original, drawn = getattr(bitflip_gpu, wrong), itertools.count()

    def other(x: Tensor, plan: Any, key: Tensor, **named: Any) -> Tensor:
        return original(x, plan, key, next(drawn), **named)  # every call draws another row

    bitflip_gpu.check_same_bits(100)
    monkeypatch.setattr(bitflip_gpu, wrong, other)
    with pytest.raises(RuntimeError, match="disagree"):
        bitflip_gpu.check_same_bits(100)
