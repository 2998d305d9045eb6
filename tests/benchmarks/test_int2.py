"""The benchmarks of packed weights: they compare the same work, and say so when they cannot."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import int2_block, int2_cpu, int2_gpu


def test_without_a_gpu_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["int2_gpu"])
    with pytest.raises(SystemExit, match="this machine has none"):
        int2_gpu.main()


def test_variants_do_the_same_work() -> None:
    made = int2_gpu.products(64, 256, 3, 3 * 64 * 256, "cpu", gemlite=False)
    assert {name: len(functions) for name, functions in made.items()} == {"bf16": 2, "packed": 12}
    outputs = [function().float() for functions in made.values() for function in functions]
    for output in outputs[1:]:
        assert (output - outputs[0]).abs().max() < 0.02 * outputs[0].abs().max()


def test_a_wrong_variant_is_no_contest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int2_gpu, "packed_linear", lambda x, codes, *_: torch.zeros(len(x), len(codes)).bfloat16())
    with pytest.raises(RuntimeError, match="packed is off"):
        int2_gpu.products(64, 256, 1, 1, "cpu", gemlite=False)


def test_ratios_compare_replays_of_the_same_round() -> None:
    entry = int2_gpu.row("a", 1, {"bf16": [10.0, 30.0, 20.0], "packed": [5.0, 10.0, 5.0]})
    assert entry["packed × bf16"] == 3.0
    assert entry["bf16 µs"] == 20.0
    assert entry["gemlite × bf16"] is entry["gemlite µs"] is None


def entry(what: str, rows: int, ratio: float) -> dict[str, Any]:
    return {"what": what, "rows": rows, "packed × bf16": ratio}


def test_goals() -> None:
    fine = [entry("a", 1, 2.6), entry("a", 64, 1.0), entry("a", 512, 0.5), entry("decode", 1, 1.2)]
    assert all(int2_gpu.goals(fine).values())
    assert not any(int2_gpu.goals([entry("a", 1, 0.9), entry("decode", 1, 1.0)]).values())
    assert not any(int2_gpu.goals([]).values()), "what was not measured is not met"


TINY = {"dim": 128, "layers": 1, "heads": 2, "kv_heads": 1, "ffn": 128, "vocab": 96, "max_seq_len": 80}


def test_decoders_run_one_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a static cache, as they are captured; the packed one has no float weights left."""
    monkeypatch.setattr(int2_gpu, "LLAMA", TINY)
    made = int2_gpu.decoders("cpu")
    with torch.no_grad():
        assert {name: tuple(decode().logits.shape) for name, decode in made.items()} == {
            "bf16": (1, 1, 96),
            "packed": (1, 1, 96),
        }


class OffTheDevice(TorchDispatchMode):
    """Operations that a CUDA graph cannot hold: those that touch host memory. (Values read on the host raise.)"""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)]
        self.seen += [str(function) for tensor in tensors if tensor.device.type == "cpu"]
        return out


@pytest.mark.parametrize("name", ["bf16", "packed"])
def test_a_token_can_be_captured(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device, which has no values to look at, a token's pass reads none and makes nothing on the host."""
    monkeypatch.setattr(int2_gpu, "LLAMA", TINY)
    decode = int2_gpu.decoders("meta")[name]
    with torch.no_grad(), OffTheDevice() as off:
        for _ in range(2):
            logits = decode().logits
    assert (logits.device.type, tuple(logits.shape)) == ("meta", (1, 1, 96))
    assert off.seen == []
    with OffTheDevice() as off, pytest.raises(RuntimeError):
        torch.ones(1).to("meta").item()
    assert off.seen, "the check can fail"


@pytest.mark.parametrize(
    ("given", "message"), [(["--rounds", "2000"], "fit into the cache"), ([], "pip install gemlite")]
)
def test_what_cannot_be_measured_is_said_first(given: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(int2_gpu.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["int2_gpu", *given])
    with pytest.raises(SystemExit, match=message):
        int2_gpu.main()


def test_cpu_ratios() -> None:
    seconds = int2_cpu.measure(64, 256, 1, rounds=2, copies_mib=1)
    assert {name: len(found) for name, found in seconds.items()} == {"packed": 2, "fp32": 2, "bf16": 2}
    made = int2_cpu.row("a", (64, 256), 1, {"packed": [1.0, 2.0], "fp32": [4.0, 4.0], "bf16": [2.0, 2.0]})
    assert made["× fp32"] == 3.0
    assert made["× fp32 range"] == "2.00-4.00"


def test_the_block_measures_a_real_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(int2_block.SHAPES, "tiny", (32, 256))
    searched = int2_block.layer("tiny", True, tokens=40)
    assert 0 < searched["output error after / before"] < 1
    assert searched["bits a weight"] == round(2 + 16 / 128 + 8 / 256, 4), "zero points of two groups take a byte"
    assert int2_block.layer("tiny", False, tokens=40)["search s"] is None


def test_two_blocks_take_training_steps() -> None:
    """The recipe's own steps; the teacher shares the frozen embedding and holds its blocks in bf16."""
    tiny = {"dim": 64, "layers": 16, "heads": 2, "kv_heads": 1, "ffn": 128, "vocab": 96, "max_seq_len": 32}
    found = int2_block.qat(tiny, 2, 16)
    layers = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128)
    trained = layers + (2 * 2 + 1) * 64
    assert found["blocks"] == "2 of 16"
    assert found["trained weights"] == trained
    assert found["optimizer MiB"] == round(8 * trained / 2**20, 1)
    assert found["teacher's own MiB"] == pytest.approx(2 * trained / 2**20, abs=0.1)
    assert 0 < found["loss"] < 10
    assert found["peak of a step MiB"] > 4 * trained / 2**20, "gradients alone"


def test_the_whole_model_is_counted_without_memory() -> None:
    """Llama-3.2-1B, tied: 1,235.8 M weights; 973.1 M of them at 2.140625 bits, the rest at 16."""
    found = {row["embedding bits"]: row for row in int2_block.whole_model()}
    linear, embedding, norms = 973_078_528, 128_256 * 2048, 33 * 2048
    assert found[16]["16-bit MiB"] == round(2 * (linear + embedding + norms) / 2**20, 1)
    expected = (linear * 2.140625 / 8 + 2 * (embedding + norms)) / 2**20
    assert found[16]["packed MiB"] == pytest.approx(expected, abs=0.1)
    assert found[4]["packed MiB"] < found[8]["packed MiB"] < found[16]["packed MiB"]
