"""Run by test_packed_linear under Triton's interpreter: the kernels against the definition."""

from __future__ import annotations

import torch

from pipeline_lib.numerics.packed_kernel import Launch, launch_for, run
from pipeline_lib.numerics.packed_linear import reference
from tests.numerics.packed_weights import TOLERANCES, packed_weight

# rows, out, in, group size, bits, dtype, bias
CASES = [
    (1, 32, 32, 32, 2, torch.float32, False),
    (1, 36, 160, 64, 2, torch.float16, True),
    (1, 32, 1056, 128, 2, torch.float32, True),
    (1, 8, 2048, 128, 2, torch.float32, False),
    (1, 32, 96, 128, 2, torch.bfloat16, False),
    (1, 32, 64, 32, 8, torch.float32, False),
    (3, 32, 96, 32, 2, torch.float32, True),
    (5, 64, 32, 16, 2, torch.float16, False),
    (17, 32, 160, 64, 4, torch.float32, True),
    (65, 32, 96, 96, 2, torch.bfloat16, True),
    (2, 32, 1024, 128, 2, torch.float32, True),
]


def main() -> None:
    torch.manual_seed(0)
    parts_seen = set()
    for rows, out, features, group, bits, dtype, has_bias in CASES:
        weight = packed_weight(out, features, group, bits)
        x = torch.randn(rows, features).to(dtype)
        bias = torch.randn(out).to(dtype) if has_bias else None
        expected = reference(x.double(), *weight, None if bias is None else bias.double(), bits, group)
        bound = TOLERANCES[dtype] * expected.abs().max()
        launches = [launch_for(rows, out, features, bits, 132), Launch(1, 8, 64 * 2 // bits)]
        for how in launches:
            got = run(x, *weight, bias, bits, group, how)
            assert got.dtype == dtype
            assert got.shape == (rows, out)
            difference = (got.double() - expected).abs().max()
            assert difference <= bound, (rows, out, features, group, bits, dtype, how, difference)
            parts_seen.add(how.parts)
    assert len(parts_seen) > 1, "no case divides the input features"
    print(f"{len(CASES)} cases agree")


if __name__ == "__main__":
    main()
