"""Ranges in real trainings: the same on one rank and on two, and in whatever pieces a batch comes."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.training_bench import Bench, Case, metrics

FINE = [{"type": "optical", "levels": 2**16, "lut_min": None, "dither": False}]


def ranges(work: Path) -> dict[str, list[list[float]]]:
    state = load_file(work / "out" / "transform.safetensors")
    return {name: tensor.tolist() for name, tensor in state.items() if name.endswith("compute.ranges")}


@pytest.mark.parametrize("recipe", ["finetune", "cram"])
def test_ranks_agree_on_ranges(recipe: str, tmp_path: Path) -> None:
    """Without a word between them a rank would see a quarter of the batch; both engines replicate or shard."""
    bench = Bench(Case(recipe, "llama"), tmp_path)
    found = []
    for processes, micro_batch in ((1, 8), (2, 2)):
        work = bench.fresh(f"on-{processes}", transform=FINE, processes=processes, micro_batch=micro_batch)
        assert bench.run(work, world=processes) == [0] * processes
        found.append((ranges(work), metrics(work)[-1]["loss"]))
    one, two = found
    assert len(one[0]) == 2 * 9
    for name, values in one[0].items():
        for a, b in zip(values, two[0][name], strict=True):
            assert a == pytest.approx(b, rel=2e-3, abs=2e-3), name
    assert one[1] == pytest.approx(two[1], rel=1e-3)
