"""Products with packed ternary weights on a CPU against unpacking the whole matrix and `F.linear`.

    python -m benchmarks.ternary_cpu [--rows 1 16 256 1024] [--features 4160] [--out 4160] [--rounds 7] [--threads 1]

The rival is the way of alex4321/bitlinear: a table of five values a byte, indexed by all bytes, times x; in the
backward pass once more. A round runs both, in turn; times are processor time. Prints a table and writes
benchmarks/ternary_cpu.json.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.report import machine, write
from pipeline_lib.numerics.ternary_linear import dequantise, ternary_linear
from pipeline_lib.numerics.trits import code_table, pack_codes, quantise


class UnpackAndMultiply(torch.autograd.Function):
    """The rival."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(packed, scale)
        ctx.features = x.shape[-1]
        return F.linear(x, whole(packed, scale, x.shape[-1]))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        packed, scale = ctx.saved_tensors
        return gradients[0] @ whole(packed, scale, ctx.features), None, None


def whole(packed: Tensor, scale: Tensor, features: int) -> Tensor:
    """The dequantised matrix, as the rival makes it."""
    table = code_table("trits", scale.dtype, packed.device) * scale
    return table[packed.long()].view(len(packed), -1)[:, :features]


def measure(rows: int, features: int, out: int, rounds: int) -> list[dict[str, Any]]:
    """One row of the table for the forward pass and one with the backward pass."""
    codes, scale = quantise(torch.randn(out, features))
    packed = pack_codes(codes)
    x = torch.randn(rows, features, requires_grad=True)
    ours = lambda: ternary_linear(x, packed, scale, features)  # noqa: E731
    rival = lambda: UnpackAndMultiply.apply(x, packed, scale)  # noqa: E731
    torch.testing.assert_close(ours(), rival(), rtol=1e-3, atol=1e-3 * features**0.5)
    weight = dequantise(packed, scale, features, "trits", None)
    exact = lambda: F.linear(x, weight)  # noqa: E731
    found = []
    for what, backward in (("forward", False), ("forward, backward", True)):
        times = [[clock(product, backward) for product in (ours, rival, exact)] for _ in range(rounds)]
        ratios = [theirs / own for own, theirs, _ in times]
        found.append(
            {
                "rows of x": rows,
                "pass": what,
                "ours, ms": round(1e3 * statistics.median(own for own, _, _ in times), 2),
                "unpack + linear, ms": round(1e3 * statistics.median(theirs for _, theirs, _ in times), 2),
                "fp32 linear, ms": round(1e3 * statistics.median(plain for _, _, plain in times), 2),
                "times as fast as unpack + linear": round(statistics.median(ratios), 2),
                "range": f"{min(ratios):.2f}-{max(ratios):.2f}",
            }
        )
    return found


def clock(product: Callable[[], Any], backward: bool) -> float:
    """Processor seconds of a product, with its backward pass or without: they stand on a machine that others use."""
    start = time.process_time()
    y = product()
    if backward:
        y.sum().backward()
    return time.process_time() - start


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 256, 1024])
    parser.add_argument("--features", type=int, default=4160)
    parser.add_argument("--out", type=int, default=4160)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    work = (arguments.features, arguments.out, arguments.rounds)
    table = [line for rows in arguments.rows for line in measure(rows, *work)]
    write("ternary_cpu", {"settings": vars(arguments), **machine()}, table)


if __name__ == "__main__":
    main()
