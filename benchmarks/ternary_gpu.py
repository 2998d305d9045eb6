"""The ternary kernels on a GPU: time against unpack + `linear` and bf16, and bytes of the weight.

    python -m benchmarks.ternary_gpu [--rows 1 64 4096] [--features 4160] [--out 14400] [--rounds 20]

Refuses to run without a GPU: nothing here is measured anywhere else. Goals: at least 2 times as fast as unpack +
linear, at most 0.25 of bf16's bytes, at one row at least 2.5 times as fast as bf16. Writes benchmarks/ternary_gpu.json.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.report import machine, write
from benchmarks.ternary_cpu import UnpackAndMultiply
from pipeline_lib.numerics.ternary_linear import dequantise, ternary_linear
from pipeline_lib.numerics.trits import pack_codes, quantise


def clock(work: Callable[[], Any]) -> float:
    """Milliseconds of a call on the device."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def measure(rows: int, features: int, out: int, rounds: int) -> dict[str, Any]:
    """One row of the table, forward passes in bf16."""
    codes, scale = quantise(torch.randn(out, features, device="cuda"))
    packed, half = pack_codes(codes), scale.bfloat16()
    weight = dequantise(packed, half, features, "trits", None)
    x = torch.randn(rows, features, device="cuda", dtype=torch.bfloat16)
    contestants: list[Callable[[], Any]] = [
        lambda: ternary_linear(x, packed, half, features),
        lambda: UnpackAndMultiply.apply(x, packed, half),
        lambda: F.linear(x, weight),
    ]
    torch.testing.assert_close(contestants[0](), contestants[2](), rtol=2e-2, atol=0.5)
    for work in contestants * 3:  # compile, warm up
        work()
    times = [[clock(work) for work in contestants] for _ in range(rounds)]
    ours, unpack, plain = (statistics.median(column) for column in zip(*times, strict=True))
    return {
        "rows of x": rows,
        "ours, ms": round(ours, 4),
        "unpack + linear, ms": round(unpack, 4),
        "bf16 linear, ms": round(plain, 4),
        "times as fast as unpack + linear": round(unpack / ours, 2),
        "times as fast as bf16": round(plain / ours, 2),
        "bytes, share of bf16": round(packed.numel() / (2 * weight.numel()), 3),
    }


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64, 4096])
    parser.add_argument("--features", type=int, default=4160)
    parser.add_argument("--out", type=int, default=14400)
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.ternary_gpu: there is no GPU here, and these figures exist on one only")
    table = [measure(rows, arguments.features, arguments.out, arguments.rounds) for rows in arguments.rows]
    write("ternary_gpu", {"settings": vars(arguments), "gpu": torch.cuda.get_device_name(), **machine()}, table)


if __name__ == "__main__":
    main()
