"""Bit flips on a GPU: our kernel against `clone` and against mase-triton 0.0.7 in the same process.

    pip install mase-triton==0.0.7
    python -m benchmarks.bitflip_gpu [--log2-elements 20 22 24 26 28] [--rounds 7] [--skip-steps]

For bf16 tensors of 1 M to 256 M elements and p = 1/2 ... 2^-24: forward into new memory, in place, forward through the
gate and backward through the gate, each as a fraction of the speed of `clone` (which moves as many bytes), and the
rival's forward where it has the probability. Then, at p = 0.01 where atomics weigh most, launches of other numbers of
warps and of Philox calls at a time, which change no bit: what the kernel's constants are chosen by. Then a training
step of 60m and 1.1b of config.yaml, compiled, in bf16, plain and with flips, and its share of the peak of 989 TFLOP/s.
Rounds are interleaved; figures are medians over rounds. Prints tables and writes benchmarks/bitflip_gpu.json. Without
a GPU, or without the rival, it refuses, and it measures nothing before the GPU has given the CPU's bits.

Goals from 64 M elements on: 0.9 of clone at p <= 2^-11, 0.8 at 1/2, 0.3 from 0.005 to 0.3, faster than clone in place
at p <= 2^-11, 15 times the rival at 2^-16; a step with flips at most 1.15 times a plain one.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from benchmarks.report import table, write
from pipeline_lib.config.errors import UserError
from pipeline_lib.config.models import count_parameters
from pipeline_lib.numerics.bitflips import flip, flip_, plan_for
from pipeline_lib.numerics.flip_cpu import threshold_bits

RIVAL, VERSION = "mase-triton", "0.0.7"
PROBABILITIES = (0.5, 0.3, 2**-4, 0.01, 0.005, 2**-10, 2**-11, 2**-13, 2**-16, 2**-20, 2**-24)
THRESHOLD = 30.0
LARGE = 1 << 26  # elements from which the goals hold
PEAK = 989e12  # dense bf16 FLOP/s of an H100 or H200 SXM
DEVICE = "cuda"
CONFIG = Path(__file__).resolve().parents[1] / "config.yaml"
SEQUENCE, BATCH = 2048, {"60m": 16, "1.1b": 4}


def rival() -> Callable[[Tensor, int], Tensor]:
    """The rival's forward as (x, n) -> x with p = 2^-n.

    Raises:
        UserError: no GPU, or no rival of the right version.
    """
    if not torch.cuda.is_available():
        raise UserError("this benchmark measures a GPU, and torch sees none", fix="run it on a machine with CUDA")
    try:
        found = importlib.metadata.version(RIVAL)
    except importlib.metadata.PackageNotFoundError:
        found = "not installed"
    if found != VERSION:
        raise UserError(
            f"the rival is {RIVAL} {VERSION}", value=found, allowed=VERSION, fix=f"pip install {RIVAL}=={VERSION}"
        )
    from mase_triton.random_bitflip.functional import (  # type: ignore[import-not-found]
        random_bitflip_fn,  # pyright: ignore[reportMissingImports]
    )

    return lambda x, n: random_bitflip_fn(x, n, n, 0, 1, None)[0]


def halves(p: float) -> int | None:
    """n where p = 2^-n is one of the rival's probabilities."""
    n = -math.log2(p)
    return int(n) if n == int(n) and 1 <= n <= 24 else None


def check_same_bits(elements: int = 3 * 8192 + 5) -> None:
    """What is measured is the stream that the CPU draws: forward, in place, and both ways through the gate.

    Raises:
        RuntimeError: the kernel gives other bits.
    """
    x, key = torch.randn(2, elements).to(torch.bfloat16), torch.tensor(1234)
    for p in PROBABILITIES:
        plan, found = plan_for(x.dtype, p), []
        for device in ("cpu", DEVICE):
            leaf, own = x.to(device, copy=True).requires_grad_(), key.to(device)
            gated = flip(leaf, plan, own, threshold=THRESHOLD)
            (gradient,) = torch.autograd.grad(gated, leaf, leaf.detach())
            made = [flip(leaf.detach(), plan, own), flip_(leaf.detach().clone(), plan, own), gated.detach(), gradient]
            found.append(torch.stack(made).view(torch.int16).cpu())
        if not torch.equal(*found):
            raise RuntimeError(f"p = {p}: the kernel and the CPU disagree")


def contestants(x: Tensor, p: float, theirs: Callable[[Tensor, int], Tensor]) -> dict[str, Callable[[], Any]]:
    """What is timed at one size and probability."""
    plan, key = plan_for(x.dtype, p), torch.tensor(1234, device=x.device)
    first = torch.zeros_like(key)  # row and element: tensors on the device, as a model's draws are
    leaf, place = x.detach().requires_grad_(), x.clone()
    gated, upstream = flip(leaf, plan, key, first, first, threshold=THRESHOLD), torch.ones_like(x)
    calls: dict[str, Callable[[], Any]] = {
        "clone": x.clone,
        "forward": lambda: flip(x, plan, key, first, first),
        "in place": lambda: flip_(place, plan, key, first, first),
        "gated": lambda: flip(x, plan, key, first, first, threshold=THRESHOLD),
        "backward": lambda: torch.autograd.grad(gated, leaf, upstream, retain_graph=True),
    }
    n = halves(p)
    return calls if n is None else {**calls, RIVAL: lambda: theirs(x, n)}


def milliseconds(call: Callable[[], Any], repeats: int = 10) -> float:
    """Mean of some calls in a row, by the GPU's clock."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / repeats


def interleaved(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each contestant in each round; the first round compiles and is dropped."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            spent = milliseconds(call)
            if number:
                times[name].append(spent)
    return times


def speed_row(elements: int, p: float, times: dict[str, list[float]]) -> dict[str, Any]:
    """One line of the table from milliseconds by contestant and round."""

    def ratio(a: str, b: str) -> float | None:
        return statistics.median(x / y for x, y in zip(times[a], times[b], strict=True)) if a in times else None

    clone = statistics.median(times["clone"])
    figures = {name: ratio("clone", name) for name in ("forward", "in place", "gated", "backward")}
    figures[f"{RIVAL} / forward"] = ratio(RIVAL, "forward")
    return {
        "elements": f"{elements >> 20} M",
        "p": f"{p:.3g}",
        "clone GB/s": round(4 * elements / clone / 1e6, 1),
        **{name: None if value is None else round(value, 2) for name, value in figures.items()},
        "goal": goal(elements, p, figures),
    }


def goal(elements: int, p: float, figures: dict[str, float | None]) -> str | None:
    """Which goals hold here, and whether they are met; None where there is none."""
    if elements < LARGE:
        return None
    wanted: dict[str, float] = {}
    if p <= 2**-11:
        wanted = {"forward": 0.9, "in place": 1.0}
    elif p == 0.5:
        wanted = {"forward": 0.8}
    elif 0.005 <= p <= 0.3:
        wanted = {"forward": 0.3}
    if p == 2**-16:
        wanted[f"{RIVAL} / forward"] = 15.0
    said = []
    for name, least in wanted.items():
        value = figures[name]
        assert value is not None
        said.append(f"{name} {least:g}: {'met' if value >= least else 'MISSED'}")
    return ", ".join(said) or None


def speeds(sizes: list[int], rounds: int, theirs: Callable[[Tensor, int], Tensor]) -> list[dict[str, Any]]:
    """All sizes and probabilities."""
    rows = []
    for log2 in sizes:
        x = torch.randn(1, 1 << log2, device=DEVICE).to(torch.bfloat16)
        rows += [speed_row(1 << log2, p, interleaved(contestants(x, p, theirs), rounds)) for p in PROBABILITIES]
    return rows


SHAPES = tuple((warps, calls) for warps in (1, 2, 4, 8, 16) for calls in (64, 128, 256, 512))


def launches(rounds: int) -> list[dict[str, Any]]:
    """At p = 0.01 and 64 M elements: milliseconds by warps of a program and Philox calls at a time."""
    from pipeline_lib.numerics import flip_kernel

    x = torch.randn(1, LARGE, device=DEVICE).to(torch.bfloat16)
    out, zero = torch.empty_like(x), torch.zeros((), dtype=torch.int64, device=DEVICE)
    plan, words = plan_for(x.dtype, 0.01), out.view(torch.int32)[0]
    gates = {"forward": None, "gated": threshold_bits(THRESHOLD, x.dtype)}

    def launch(gate: int | None, warps: int, calls: int) -> Callable[[], None]:
        return lambda: flip_kernel.launch(x, out, words, zero, zero, zero, plan, gate, warps=warps, calls=calls)

    timed = {
        name: interleaved({f"{w} {c}": launch(gate, w, c) for w, c in SHAPES}, rounds) for name, gate in gates.items()
    }
    return [
        {
            "warps": warps,
            "calls": calls,
            **{f"{name} ms": round(statistics.median(timed[name][f"{warps} {calls}"]), 4) for name in gates},
        }
        for warps, calls in SHAPES
    ]


def sizes_of_config(name: str) -> dict[str, Any]:
    """Model settings of a size in config.yaml, with its vocabulary and our sequence length."""
    config = yaml.safe_load(CONFIG.read_text())
    entry = config["models"][name]
    vocab = config["tokenizers"][entry["tokenizer"]]["vocab"]
    return {"family": "llama", **entry["llama"], "vocab": vocab, "max_seq_len": SEQUENCE}


def flops_per_token(model: dict[str, Any], length: int) -> float:
    """6 N + 12 layers · dim · length (Chowdhery et al. 2022, PaLM, appendix B), N without the input embedding."""
    return 6 * count_parameters(model)[1] + 12 * model["layers"] * model["dim"] * length


def step_rows(name: str, model: dict[str, Any], tokens: int, times: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Lines of the table of training steps from milliseconds by variant and round."""
    rows = []
    for variant, own in times.items():
        ratio = statistics.median(a / b for a, b in zip(own, times["plain"], strict=True))
        middle = statistics.median(own)
        used = flops_per_token(model, SEQUENCE) * tokens / (middle / 1e3) / PEAK
        rows.append(
            {
                "model": name,
                "variant": variant,
                "ms a step": round(middle, 2),
                "ratio": round(ratio, 3),
                "MFU": round(used, 3),
                "goal": None if variant == "plain" else f"1.15: {'met' if ratio <= 1.15 else 'MISSED'}",
            }
        )
    return rows


def steps(name: str, rounds: int) -> list[dict[str, Any]]:
    """A compiled training step of a model, plain and with config.yaml's `bitflip`."""
    from pipeline_lib.models import llama
    from pipeline_lib.transforms.apply import apply

    settings = sizes_of_config(name)
    entry = {"type": "bitflip", **yaml.safe_load(CONFIG.read_text())["transforms"]["bitflip"]}
    torch.compiler.reset()  # past a number of compilations of one function, compiled models would run uncompiled
    variants = {"plain": [], "bitflip": [entry], "bitflip, shared input": [{**entry, "shared_input": True}]}
    tokens = torch.randint(0, settings["vocab"], (BATCH[name], SEQUENCE), device=DEVICE)

    def trainer(transform: list[dict[str, Any]]) -> Callable[[], None]:
        torch.manual_seed(0)
        with torch.device(DEVICE):
            model: Any = llama.build(settings)
            model.to(torch.bfloat16)
        applied = apply(model, transform, seed=0, global_batch=BATCH[name])
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        compiled = torch.compile(model)
        done = [0]

        def step() -> None:
            applied.context.begin(done[0], 0)
            done[0] += 1
            compiled(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    times = interleaved({variant: trainer(transform) for variant, transform in variants.items()}, rounds)
    gc.collect()
    torch.cuda.empty_cache()
    return step_rows(name, settings, tokens.numel(), times)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log2-elements", type=int, nargs="+", default=[20, 22, 24, 26, 28])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--skip-steps", action="store_true", help="leave the training steps out")
    arguments = parser.parse_args()
    try:
        theirs = rival()
    except UserError as error:
        raise SystemExit(str(error)) from None
    check_same_bits()
    rows = speeds(arguments.log2_elements, arguments.rounds, theirs)
    others = {"launches at p = 0.01": launches(arguments.rounds)}
    if not arguments.skip_steps:
        others["training steps"] = [row for name in BATCH for row in steps(name, arguments.rounds)]
    settings = {**vars(arguments), RIVAL: VERSION, "gpu": torch.cuda.get_device_name(), "peak FLOP/s": PEAK}
    for name, found in others.items():
        print(f"\n{name}\n{table(found)}")
    write("bitflip_gpu", {"settings": settings, **others}, rows)


if __name__ == "__main__":
    main()
