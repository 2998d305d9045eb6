"""Optical products in training on a CPU: our step against a plain-torch formulation and the untransformed step.

    python -m benchmarks.optical_step [--rounds 5] [--steps 2] [--threads 1]

The model, batch, precision and optimizer are those of config.yaml's `nano`, the transform has its defaults. "plain
torch" is the same transform, ranges and all, with every product written as torch operations that autograd
differentiates: straight-through rounding of both operands and of the result, noise from torch's generator. Times are
taken in turn in one process, and a round's ratio compares neighbours. Memory is what a process of its own had at its
peak beyond what it had before its first step. Prints a table and writes benchmarks/optical_step.json. Goals on a GPU
(see optical_gpu): at most half the time and half the memory of plain torch, twice the untransformed step.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import write
from pipeline_lib.models import llama
from pipeline_lib.transforms.apply import apply
from pipeline_lib.transforms.base import Draw
from pipeline_lib.transforms.optical import compute
from pipeline_lib.transforms.optical.product import How

NANO = {"dim": 128, "layers": 4, "heads": 4, "kv_heads": 2, "ffn": 384, "vocab": 2048, "max_seq_len": 128}
BATCH, LENGTH = 16, 128
OURS, RIVAL, PLAIN = "ours", "plain torch", "untransformed"
ROOT = Path(__file__).resolve().parents[1]


def plain_product(
    left: Tensor, right: Tensor, ranges: Tensor, knobs: Tensor, draw: Draw | None, how: How
) -> tuple[Tensor, Tensor]:
    """`product` as one would write it: the same arguments and results, noise from torch's own generator.

    Rounding is in fp32, where 256 levels are told apart; the product is in the dtype of the operands.
    """
    a, b = rounded(left.float(), ranges[0], knobs[0]), rounded(right.float(), ranges[1], knobs[0], how.lut_min)
    a, b = a.to(left.dtype), b.to(left.dtype)
    c = (a @ (b.t() if how.linear else b)).float()
    y = rounded(c, ranges[2], knobs[1], noise=draw is not None)
    seen = torch.stack([torch.stack([-value.min(), value.max()]) for value in (left, right, c)])
    return y.to(left.dtype), seen.detach().float()


def rounded(value: Tensor, range: Tensor, steps: Tensor, lut_min: float | None = None, noise: bool = False) -> Tensor:
    """`value` on the levels of its range, its gradient straight through."""
    low, high = range[0], range[1]
    span = high - low
    u = (value.clamp(low, high) - low) / span * steps
    u = torch.round(u + torch.rand_like(u) - 0.5) if noise else torch.round(u)
    y = u / steps * span + low
    if lut_min is not None:
        y = torch.where((y > 0) & (y < lut_min * high), lut_min * high, y)
        y = torch.where((y < 0) & (y > -lut_min * low.abs()), -lut_min * low.abs(), y)
    y = torch.where(low <= high, y, value)
    return value + (y - value).detach()


def trainer(contestant: str) -> Callable[[int], Tensor]:
    """A function that does one training step, numbered from 0."""
    torch.manual_seed(0)
    model = llama.build(NANO).train()
    applied = apply(model, [] if contestant == PLAIN else [{"type": "optical"}], seed=0, global_batch=BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(0, NANO["vocab"], (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    own = compute.product

    def step(number: int) -> Tensor:
        compute.product = plain_product if contestant == RIVAL else own
        try:
            applied.context.begin(number, 0)
            loss = model(input_ids=tokens, labels=tokens).loss
        finally:
            compute.product = own
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        applied.settle()
        return loss.detach()

    return step


def seconds(rounds: int, steps: int) -> dict[str, list[tuple[float, float]]]:
    """(wall, processor) seconds a step of each contestant in each round."""
    contestants = {name: trainer(name) for name in (PLAIN, OURS, RIVAL)}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    done = 0
    for number in range(rounds + 1):
        for name, step in contestants.items():
            wall, processor = time.perf_counter(), time.process_time()
            for i in range(steps):
                step(done + i)
            spent = (time.perf_counter() - wall) / steps, (time.process_time() - processor) / steps
            if number:  # the first steps allocate and fill caches, and ranges are not known yet
                found[name].append(spent)
        done += steps
    return found


def peak(contestant: str) -> int:
    """Bytes that three steps take at their peak, in a process of its own."""
    run = [sys.executable, "-m", "benchmarks.optical_step", "--peak-of", contestant]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True)
    return int(done.stdout)


def own_peak(contestant: str) -> int:
    """The same for this process, which must be fresh."""
    torch.set_num_threads(1)
    step = trainer(contestant)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(3):
        step(number)
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def rows(times: dict[str, list[tuple[float, float]]], peaks: dict[str, int]) -> list[dict[str, Any]]:
    """A line for each contestant; ratios to it are ours over it, round by round."""
    made = []
    for name, own in times.items():
        pairs = list(zip(times[OURS], own, strict=True))
        made.append(
            {
                "step": name,
                "ms": round(statistics.median(wall for wall, _ in own) * 1e3, 1),
                "peak MiB": round(peaks[name] / 2**20, 1),
                "ours / it": round(statistics.median(a / b for (a, _), (b, _) in pairs), 3),
                "range": f"{min(a / b for (a, _), (b, _) in pairs):.2f}-{max(a / b for (a, _), (b, _) in pairs):.2f}",
                "processor time, ours / it": round(statistics.median(a / b for (_, a), (_, b) in pairs), 3),
                "peak, ours / it": round(peaks[OURS] / peaks[name], 3),
            }
        )
    return made


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peak-of", choices=(PLAIN, OURS, RIVAL), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak_of:
        print(own_peak(arguments.peak_of))
        return
    torch.set_num_threads(arguments.threads)
    peaks = {name: peak(name) for name in (PLAIN, OURS, RIVAL)}
    times = seconds(arguments.rounds, arguments.steps)
    settings = {name: value for name, value in vars(arguments).items() if name != "peak_of"}
    write("optical_step", {"settings": settings, "model": NANO}, rows(times, peaks))


if __name__ == "__main__":
    main()
