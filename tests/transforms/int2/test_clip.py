"""The clipping search against the search written out, and what it finds on layers where the answer is known."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline_lib.numerics.grids import GRIDS
from pipeline_lib.transforms.int2 import clip as module
from pipeline_lib.transforms.int2.clip import factors, search
from pipeline_lib.transforms.int2.settings import Clip, Settings


def given(**settings: Any) -> tuple[Settings, Clip]:
    chosen = Settings(**{"group_size": 16, "scale_dtype": "float32", "clip": Clip(), **settings})
    assert chosen.clip is not None
    return chosen, chosen.clip


def layer(out: int, features: int, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, features, generator=generator) * 0.1
    weight *= 1 + 3 * (torch.rand(out, features, generator=generator) < 0.05)  # outliers, which clipping is for
    inputs = torch.randn(tokens, features, generator=generator) * torch.logspace(-1, 0.5, features)
    return weight, inputs


def quantised(group: Tensor, low: float, high: float, name: str) -> Tensor:
    grid = GRIDS[name]
    clamped = group.clamp(low, high)
    parameters = grid.parameters(clamped.amin()[None], clamped.amax()[None], torch.float32)
    return grid.values(grid.codes(clamped[None], parameters), parameters)[0]


def searched(weight: Tensor, inputs: Tensor, size: int, name: str) -> tuple[Tensor, Tensor]:
    """Ranges, and least errors: a hundred candidates for each row and group, one after the other, in fp64 sums."""
    ranges, errors = [], []
    for row in weight:
        for start in range(0, len(row), size):
            group, x = row[start : start + size], inputs[:, start : start + size].double()
            best = (math.inf, 0.0, 0.0)
            for i in range(10):
                for j in range(10):
                    high, low = float(group.max()) * (1 - i / 20), float(group.min()) * (1 - j / 20)
                    change = quantised(group, low, high, name) - group
                    error = float((x @ change.double()).square().mean())
                    if error < best[0]:
                        best = (error, low, high)
            ranges.append(best[1:])
            errors.append(best[0])
    groups = -(-weight.shape[1] // size)
    return torch.tensor(ranges).view(len(weight), groups, 2), torch.tensor(errors).view(len(weight), groups)


@pytest.mark.parametrize("name", ["int2-asym", "n2f3"])
@pytest.mark.parametrize(("out", "features", "size", "tokens"), [(3, 32, 16, 40), (2, 40, 16, 7), (1, 16, 16, 1)])
def test_it_finds_the_best_of_a_hundred(name: str, out: int, features: int, size: int, tokens: int) -> None:
    """Any number of rows, a last group that is not full, and fewer tokens than a group has features."""
    weight, inputs = layer(out, features, tokens)
    found, figures = search(weight, inputs, *given(format=name, group_size=size))
    ranges, errors = searched(weight, inputs, size, name)
    assert figures["group_error_after"] == pytest.approx(float(errors.sum(1).mean()), rel=1e-3, abs=1e-9)
    for at in itertools.product(range(out), range(errors.shape[1])):
        low, high = float(found["minimum"][at]), float(found["maximum"][at])
        if (low, high) == pytest.approx(ranges[at].tolist(), abs=1e-6):
            continue
        columns = slice(at[1] * size, (at[1] + 1) * size)
        change = quantised(weight[at[0], columns], low, high, name) - weight[at[0], columns]
        error = float((inputs[:, columns].double() @ change.double()).square().mean())
        assert error == pytest.approx(float(errors[at]), rel=1e-5), "another candidate only where the two tie"


def test_the_sides_are_independent() -> None:
    """An outlier below, that no input looks at, is cut off at the grid's end; the maximum stays where it is."""
    weight = torch.tensor([[-1 / 0.6, *[-1.0, 0.0, 1.0, 2.0, 1.0] * 3]])
    inputs = torch.eye(16)[1:]
    found, figures = search(weight, inputs, *given())
    assert found["maximum"].item() == 2
    assert found["minimum"].item() == pytest.approx(-1)
    assert figures["output_error_after"] < figures["output_error_before"]


def test_of_equal_candidates_the_least_shrunk_is_taken() -> None:
    """No input, no error: a hundred ties."""
    weight, _ = layer(4, 32, 1)
    found, figures = search(weight, torch.zeros(5, 32), *given())
    groups = weight.unflatten(1, (2, 16))
    assert torch.equal(found["maximum"], groups.amax(-1))
    assert torch.equal(found["minimum"], groups.amin(-1))
    assert all(math.isfinite(value) for value in figures.values())


def test_clipping_never_makes_a_groups_error_larger() -> None:
    for seed in range(5):
        weight, inputs = layer(16, 64, 100, seed)
        _, figures = search(weight, inputs, *given())
        assert figures["group_error_after"] < figures["group_error_before"]


def test_the_report_is_about_the_best_candidate() -> None:
    """And about the whole layer, not its last rows."""
    weight, inputs = layer(8, 32, 50)
    found, figures = search(weight, inputs, *given())
    low = found["minimum"].repeat_interleave(16, 1)
    high = found["maximum"].repeat_interleave(16, 1)
    clipped = weight.clamp(low, high).unflatten(1, (2, 16))
    grid = GRIDS["int2-asym"]
    parameters = grid.parameters(clipped.amin(-1), clipped.amax(-1), torch.float32)
    change = grid.values(grid.codes(clipped, parameters), parameters).flatten(1) - weight
    expected = (inputs @ change.T).square().mean() / (inputs @ weight.T).square().mean()
    assert figures["output_error_after"] == pytest.approx(float(expected), rel=1e-5)


def test_chunks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, inputs = layer(37, 48, 60)
    whole, _ = search(weight, inputs, *given())
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 5 * 48)
    parts, _ = search(weight, inputs, *given())
    assert torch.equal(whole["minimum"], parts["minimum"])
    assert torch.equal(whole["maximum"], parts["maximum"])


@pytest.mark.parametrize("size", [-1, 5, 64, 1000])
def test_any_group_size(size: int) -> None:
    weight, inputs = layer(6, 64, 30)
    found, figures = search(weight, inputs, *given(group_size=size))
    assert found["minimum"].shape == (6, {-1: 1, 5: 13, 64: 1, 1000: 1}[size])
    assert figures["group_error_after"] <= figures["group_error_before"]


def test_large_errors_are_errors_too() -> None:
    """A search that starts from some large number keeps nothing where every error is larger."""
    weight, inputs = layer(4, 16, 20)
    found, _ = search(weight, inputs * 1e6, *given())
    plain, _ = search(weight, inputs, *given())
    assert torch.allclose(found["maximum"], plain["maximum"])


def test_the_candidates() -> None:
    assert factors(Clip()) == pytest.approx([1 - i / 20 for i in range(10)])
    assert factors(Clip(grid=4, max_shrink=1.0)) == [1, 0.75, 0.5, 0.25]
    assert factors(Clip(max_shrink=0.01)) == [1]
