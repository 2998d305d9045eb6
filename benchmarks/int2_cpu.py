"""One row times a 2-bit weight on a CPU: the packed product against fp32 and bf16 `F.linear`, in turn in one process.

    python -m benchmarks.int2_cpu [--threads 1] [--rounds 15] [--copies_mib 256]

Shapes are those of Llama-3.2-1B's linear layers, groups of 128. Every product meets another copy of its weight, and the
copies of one variant together exceed the caches, as the layers of a model do. A round times each variant once; a ratio
compares neighbours in time. Prints a table and writes benchmarks/int2_cpu.json. The goal is a ratio above 1 at one row.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.report import write
from pipeline_lib.numerics import packed_cpu
from pipeline_lib.numerics.packed_linear import packed_linear, reference
from pipeline_lib.numerics.packing import pack

GROUP = 128
SHAPES = {"q, o": (2048, 2048), "k, v": (512, 2048), "gate, up": (8192, 2048), "down": (2048, 8192)}


def variants(out: int, features: int, rows: int, copies_mib: int) -> dict[str, list[Callable[[], Any]]]:
    """Products of the same size: for each variant one function a copy of its weight."""
    groups = features // GROUP
    codes = pack(torch.randint(0, 4, (out, features)), 2)
    scale = (torch.rand(out, groups) + 0.5).half()
    zero = pack(torch.randint(0, 4, (out, groups)), 2)
    x = torch.randn(rows, features)
    check = reference(x, codes, scale, zero, None, 2, GROUP)
    if not torch.allclose(packed_linear(x, codes, scale, zero, None, 2, GROUP), check, rtol=1e-3, atol=1e-2):
        raise RuntimeError("the packed product is wrong; its speed means nothing")

    def copies(size: int) -> range:
        return range(max(1, (copies_mib << 20) // size))

    fp32 = [torch.randn(out, features) for _ in copies(4 * out * features)]
    bf16 = [torch.randn(out, features).bfloat16() for _ in copies(2 * out * features)]
    rounded = x.bfloat16()
    packed = [(codes.clone(), scale.clone(), zero.clone()) for _ in copies(codes.numel())]
    return {
        "packed": [lambda w=w: packed_linear(x, *w, None, 2, GROUP) for w in packed],
        "fp32": [lambda w=w: F.linear(x, w) for w in fp32],
        "bf16": [lambda w=w: F.linear(rounded, w) for w in bf16],
    }


def measure(out: int, features: int, rows: int, rounds: int, copies_mib: int) -> dict[str, list[float]]:
    """Seconds of each round for each variant, each the mean over 8 products."""
    made = variants(out, features, rows, copies_mib)
    next_copy = dict.fromkeys(made, 0)

    def timed(name: str) -> float:
        start = time.perf_counter()
        for _ in range(8):
            made[name][next_copy[name] % len(made[name])]()
            next_copy[name] += 1
        return (time.perf_counter() - start) / 8

    for name in made:
        timed(name)
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(rounds):
        for name in made:
            seconds[name].append(timed(name))
    return seconds


def row(layer: str, shape: tuple[int, int], rows: int, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, and the packed product's speed as a multiple of the others' in the same round."""
    ratios = {
        name: [other / own for other, own in zip(seconds[name], seconds["packed"], strict=True)]
        for name in ("fp32", "bf16")
    }
    return {
        "layer": layer,
        "out × in": f"{shape[0]} × {shape[1]}",
        "rows": rows,
        **{f"{name} ms": round(statistics.median(found) * 1e3, 3) for name, found in seconds.items()},
        "× fp32": round(statistics.median(ratios["fp32"]), 2),
        "× fp32 range": f"{min(ratios['fp32']):.2f}-{max(ratios['fp32']):.2f}",
        "× bf16": round(statistics.median(ratios["bf16"]), 2),
    }


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--copies_mib", type=int, default=256)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if not packed_cpu.available():
        raise SystemExit("the packed product needs a C compiler (cc, or $CC)")
    rows = [
        row(name, shape, count, measure(*shape, count, arguments.rounds, arguments.copies_mib))
        for count in arguments.rows
        for name, shape in SHAPES.items()
    ]
    write("int2_cpu", {"settings": vars(arguments), "group_size": GROUP}, rows)


if __name__ == "__main__":
    main()
