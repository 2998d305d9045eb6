"""Run by test_ternary_kernel under Triton's interpreter: the kernels against dequantise-and-multiply."""

from __future__ import annotations

import itertools

import torch

from pipeline_lib.numerics import ternary_kernel
from pipeline_lib.numerics.ternary_linear import dequantise
from pipeline_lib.numerics.trits import Layout, pack_codes

SHAPES = [(1, 7, 23), (3, 65, 160), (5, 33, 41), (70, 70, 333)]  # rows of x, out, in
GRIDS: list[tuple[bool, int | None]] = [(True, None), (False, None), (False, 8)]
LAYOUTS: tuple[Layout, ...] = ("trits", "two_bit")


def case(rows: int, out: int, features: int, per_tensor: bool, group: int | None, layout: Layout) -> None:
    """Small integers and scales that are powers of two: every sum is exact, so equal means equal."""
    codes = torch.randint(-1, 2, (out, features))
    packed = pack_codes(codes, layout)
    groups = 1 if group is None else -(-features // group)
    scale = 2.0 ** torch.randint(-2, 2, (1, 1) if per_tensor else (out, groups)).float()
    weight = dequantise(packed, scale, features, layout, group)
    x = torch.randint(-8, 9, (rows, features)).float()
    gradient = torch.randint(-8, 9, (rows, out)).float()
    y = ternary_kernel.forward(x, packed, scale, layout, group)
    back = ternary_kernel.input_gradient(gradient, packed, scale, features, layout, group)
    assert torch.equal(y, x @ weight.t()), (rows, out, features, layout, group)
    assert torch.equal(back, gradient @ weight), (rows, out, features, layout, group)
    assert bool(y.any()), "something is multiplied"


def main() -> None:
    torch.manual_seed(0)
    count = 0
    for shape, (per_tensor, group), layout in itertools.product(SHAPES, GRIDS, LAYOUTS):
        case(*shape, per_tensor, group, layout)
        count += 1
    # Bytes that no packing makes, left by a fault, read as on the CPU.
    packed = torch.tensor([[243, 255, 200]], dtype=torch.uint8)
    for layout in LAYOUTS:
        features = 12
        weight = dequantise(packed, torch.ones(1, 1), features, layout, None)
        x = torch.arange(features).float()[None]
        assert torch.equal(ternary_kernel.forward(x, packed, torch.ones(1, 1), layout, None), x @ weight.t()), layout
    print(f"{count} cases equal")


if __name__ == "__main__":
    main()
