"""Bit flips on a CPU: our operation against a naive one and against a copy, on the same bf16 tensor in one process.

    python -m benchmarks.bitflip_cpu [--log2-elements 24] [--threads 2] [--rounds 5] [--repeats 3]

The naive form is `x ^ ((rand(n, 16) < p) << k).sum(-1)`, in 16-bit integers (64-bit ones take it five times as long);
its time does not depend on p, so it runs once a round at p = 2^-10. `flip` is ours as a user calls it, into new memory,
as the naive form is. `into` writes into memory that was there, compared with `copy_` into that memory; `in place`
is `flip_`. Rounds are interleaved; a figure is the median over rounds, a ratio the median of the ratios within rounds.
Each time is the shortest of `repeats` calls in a row. Prints a table and writes benchmarks/bitflip_cpu.json.

Goals: 100 times the naive form at p = 2^-10, 20 times at 1/2, 5 times everywhere; half a copy's speed at p <= 2^-16.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import write
from pipeline_lib.numerics.bitflips import flip, flip_, plan_for
from pipeline_lib.numerics.flip_native import flip_memory, is_available
from pipeline_lib.numerics.flip_plan import FlipPlan
from pipeline_lib.numerics.flip_reference import Window

PROBABILITIES = (2**-24, 2**-16, 1e-4, 2**-10, 0.005, 0.01, 0.03, 2**-4, 0.1, 0.3, 0.4, 0.45, 0.5)
KEY = 20_240_607


def naive(x: Tensor, p: float) -> Tensor:
    """The textbook form, on the bits of `x` [n], int16."""
    k = torch.arange(16, dtype=torch.int16)
    return x ^ ((torch.rand(x.numel(), 16) < p) << k).sum(-1, dtype=torch.int16)


def into(x: Tensor, out: Tensor, plan: FlipPlan) -> None:
    """Our kernel, out of place, into memory that is there."""
    flip_memory(x.data_ptr(), out.data_ptr(), plan, Window(KEY, 0, 1, 0, x.numel()))


def shortest(call: Callable[[], Any], repeats: int) -> float:
    """Seconds of the fastest of some calls."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def measure(elements: int, rounds: int, repeats: int, probabilities: tuple[float, ...]) -> list[dict[str, Any]]:
    """One row for each probability."""
    if not is_available():
        raise RuntimeError("the C kernel cannot be built here: see the warning above")
    x = torch.randn(1, elements).to(torch.bfloat16)
    out, key = torch.zeros_like(x), torch.tensor(KEY)
    plans = {p: plan_for(torch.bfloat16, p) for p in probabilities}
    check_same_bits(x[:, : 1 << 16], plans)
    seconds: dict[tuple[str, float], list[float]] = {}
    for _ in range(rounds):
        rival = shortest(lambda: naive(x.view(torch.int16)[0], 2**-10), 1)
        for p, plan in plans.items():
            calls: dict[str, Callable[[], Any]] = {
                "copy": lambda: out.copy_(x),
                "into": lambda plan=plan: into(x, out, plan),
                "flip": lambda plan=plan: flip(x, plan, key),
                "in place": lambda plan=plan: flip_(out, plan, key),
            }
            seconds.setdefault(("naive", p), []).append(rival)
            for name, call in calls.items():
                seconds.setdefault((name, p), []).append(shortest(call, repeats))
    return [row(p, {name: seconds[name, p] for name in ("naive", *calls)}) for p in probabilities]


def check_same_bits(x: Tensor, plans: dict[float, FlipPlan]) -> None:
    """What is measured by memory is what `flip` gives."""
    for p, plan in plans.items():
        out = torch.zeros_like(x)
        into(x.contiguous(), out, plan)
        if not torch.equal(out.view(torch.int16), flip(x, plan, torch.tensor(KEY)).view(torch.int16)):
            raise RuntimeError(f"p = {p}: the kernel and the operation disagree")


def row(p: float, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """The figures of one probability from seconds by contestant and round."""

    def ratio(a: str, b: str) -> float:
        return statistics.median(x / y for x, y in zip(seconds[a], seconds[b], strict=True))

    faster, of_copy = ratio("naive", "flip"), ratio("copy", "into")
    return {
        "p": f"{p:.3g}",
        **{f"{name} ms": round(statistics.median(own) * 1e3, 2) for name, own in seconds.items()},
        "naive / flip": round(faster, 1),
        "copy / into": round(of_copy, 2),
        "goal": goal(p, faster, of_copy),
    }


def goal(p: float, faster: float, of_copy: float) -> str:
    """The goals that stand at p, and whether they are met."""
    wanted = 100 if p == 2**-10 else 20 if p == 0.5 else 5
    said = [f"{wanted}x naive: {'met' if faster >= wanted else 'MISSED'}"]
    if p <= 2**-16:
        said.append(f"0.5x copy: {'met' if of_copy >= 0.5 else 'MISSED'}")
    return ", ".join(said)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log2-elements", type=int, default=24)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    load = [round(os.getloadavg()[0], 1)]
    rows = measure(1 << arguments.log2_elements, arguments.rounds, arguments.repeats, PROBABILITIES)
    load.append(round(os.getloadavg()[0], 1))
    write("bitflip_cpu", {"settings": vars(arguments), "load average before and after": load}, rows)


if __name__ == "__main__":
    main()
