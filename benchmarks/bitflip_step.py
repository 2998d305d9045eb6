"""What bit flips cost in training: a step of `nano` with flips against a plain one, in turn in one process.

    python -m benchmarks.bitflip_step [--probabilities 1e-5 1e-4 1e-3] [--threads 2] [--rounds 5] [--steps 4]

The model, batch, precision, optimizer and thresholds are those of config.yaml's `nano` and `bitflip-nano`. For each
round every variant trains `steps` steps, and a round's ratio compares neighbours in time. Prints a table and writes
benchmarks/bitflip_step.json. The goal is a ratio of at most 1.5 at the demo's p.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import machine, write
from pipeline_lib.models import llama
from pipeline_lib.transforms.apply import apply

NANO = {"dim": 128, "layers": 4, "heads": 4, "kv_heads": 2, "ffn": 384, "vocab": 2048, "max_seq_len": 128}
BATCH, LENGTH = 16, 128
ZERO_OUT = {"weight": 1.25, "input": 30.0}


def trainer(p: float | None) -> Callable[[int], Tensor]:
    """A function that does one training step, numbered from 0, plain if `p` is None."""
    torch.manual_seed(0)
    model = llama.build(NANO)
    operands = {role: {"p": p, "zero_out": threshold} for role, threshold in ZERO_OUT.items()}
    transform = [] if p is None else [{"type": "bitflip", **operands}]
    applied = apply(model, transform, seed=0, global_batch=BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(0, NANO["vocab"], (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))

    def step(number: int) -> Tensor:
        applied.context.begin(number, 0)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def measure(probabilities: list[float], rounds: int, steps: int) -> list[dict[str, Any]]:
    """Median and range of seconds a step, and of the ratio to the plain step of the same round.

    The ratio of processor time is given as well: it stands on a machine that others use.
    """
    variants = {None: trainer(None), **{p: trainer(p) for p in probabilities}}
    done = dict.fromkeys(variants, 0)

    def timed(p: float | None) -> tuple[float, float]:
        wall, processor = time.perf_counter(), time.process_time()
        for _ in range(steps):
            variants[p](done[p])
            done[p] += 1
        return (time.perf_counter() - wall) / steps, (time.process_time() - processor) / steps

    for p in variants:  # the first steps allocate and fill caches
        timed(p)
    seconds: dict[float | None, list[tuple[float, float]]] = {p: [] for p in variants}
    for _ in range(rounds):
        for p in variants:
            seconds[p].append(timed(p))
    return [row("plain" if p is None else p, own, seconds[None]) for p, own in seconds.items()]


def row(name: float | str, own: list[tuple[float, float]], plain: list[tuple[float, float]]) -> dict[str, Any]:
    """The figures of one variant from (wall, processor) seconds of each round."""
    walls = [wall for wall, _ in own]
    ratios = [a / b for (a, _), (b, _) in zip(own, plain, strict=True)]
    processor = [a / b for (_, a), (_, b) in zip(own, plain, strict=True)]
    return {
        "p": name,
        "ms a step": round(statistics.median(walls) * 1e3, 1),
        "range": f"{min(walls) * 1e3:.1f}-{max(walls) * 1e3:.1f}",
        "ratio": round(statistics.median(ratios), 3),
        "ratio range": f"{min(ratios):.2f}-{max(ratios):.2f}",
        "ratio of processor time": round(statistics.median(processor), 3),
    }


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--probabilities", type=float, nargs="+", default=[1e-5, 1e-4, 1e-3])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = measure(arguments.probabilities, arguments.rounds, arguments.steps)
    write("bitflip_step", {"settings": vars(arguments), "model": NANO, "rows": rows, **machine()}, rows)


if __name__ == "__main__":
    main()
