"""Rates, per-bit uniformity and independence of flips, and the mutants that each check must catch."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline_lib.numerics.bitflips import plan_for
from pipeline_lib.numerics.flip_plan import FLOAT_MASKS, FlipPlan, float_plan, make_plan
from pipeline_lib.numerics.streams import site_key, step_key
from tests.numerics.flip_checks import (
    all_dependences,
    count_bits,
    count_sparse,
    dependence_problem,
    mask_of,
    rate_problem,
    split_problem,
)

KEY = site_key(11, "model.layers.3.self_attn.o_proj", "weight")
RATES = (0.5, 0.3, 2**-4, 0.01, 2**-10, 1e-4, 2**-20)


def counts_at(plan: FlipPlan, p: float, group: int) -> tuple[np.ndarray, int]:
    """Flips by bit of enough elements for 10,000 expected ones in a group of `group` bits, and the elements."""
    elements = max(1 << 16, int(1.1e4 / (p * group)) // 64 * 64)
    if elements > 1 << 21:
        return count_sparse(plan, KEY, 64, elements // 64), elements
    return count_bits(mask_of(plan, KEY, 64, elements // 64), plan.bits), elements


@pytest.mark.parametrize("p", RATES)
@pytest.mark.parametrize("dtype", FLOAT_MASKS)
def test_every_bit_flips_at_its_rate(dtype: str, p: float) -> None:
    bits, *groups = FLOAT_MASKS[dtype]
    plan = float_plan(dtype, p, p)
    smallest = min(mask.bit_count() for mask in groups)
    counts, elements = counts_at(plan, p, smallest)
    for mask in groups:
        assert rate_problem(counts, elements, mask, p) is None
    # Mutants: half the rate, no flips, and one bit that takes the flips of another.
    assert rate_problem(counts // 2, elements, groups[0], p) is not None
    assert rate_problem(counts * 0, elements, groups[0], p) is not None
    if p < 0.5:
        moved = counts.copy()
        moved[[bits - 1, bits - 2]] = 0, counts[bits - 1] + counts[bits - 2]
        assert rate_problem(moved, elements, groups[0], p) is not None


@pytest.mark.parametrize(("p_exp", "p_frac"), [(0.0, 0.01), (0.3, 2**-6), (2**-12, 2**-10), (0.75, 0.02), (1.0, 0.1)])
@pytest.mark.parametrize("dtype", FLOAT_MASKS)
def test_groups_flip_each_at_its_own_rate(dtype: str, p_exp: float, p_frac: float) -> None:
    bits, exponent, fraction = FLOAT_MASKS[dtype]
    plan = float_plan(dtype, p_exp, p_frac)
    elements = 1 << 20 if min(p_exp or 1, p_frac) > 0.005 else 1 << 23
    counts = count_bits(mask_of(plan, KEY, 8, elements // 8), bits)
    assert rate_problem(counts, elements, exponent, p_exp) is None
    assert rate_problem(counts, elements, fraction, p_frac) is None
    assert rate_problem(counts, elements, fraction, p_exp) is not None


def test_integer_codes_flip_by_groups_of_bits() -> None:
    groups = [(0x03, 0.02), (0x0C, 2**-5), (0xC0, 0.4)]
    counts = count_bits(mask_of(make_plan(8, groups), KEY, 4, 1 << 18), 8)
    for mask, p in groups:
        assert rate_problem(counts, 1 << 20, mask, p) is None
    assert counts[4:6].tolist() == [0, 0]


def test_mutant_half_probability_fails() -> None:
    counts, elements = counts_at(plan_for(torch.float32, 0.005), 0.01, 9)
    assert rate_problem(counts, elements, FLOAT_MASKS["float32"][1], 0.01) is not None


def test_mutant_without_flips_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline_lib.numerics.flip_cpu.flipped", lambda x, window, plan, threshold: (x.clone(), False))
    counts = count_bits(mask_of(plan_for(torch.float32, 0.01), KEY, 8, 1 << 14), 32)
    assert rate_problem(counts, 1 << 17, FLOAT_MASKS["float32"][1], 0.01) is not None


def test_flips_within_a_mask_are_independent() -> None:
    """Neighbouring bits, words and tiles."""
    for p in (0.3, 2**-4, 0.01):
        mask = mask_of(plan_for(torch.float32, p), KEY, 1, 1 << 20)[0]
        for shift in (1, 4, 1024, 4096):
            assert dependence_problem(mask[:-shift], mask[shift:], 32, p) is None
        rotated = (mask << 1) | ((mask >> 31) & 1)
        assert dependence_problem(mask, rotated, 32, p) is None
        assert dependence_problem(mask, mask.clone(), 32, p) is not None


def test_counts_of_tiles_scatter_as_they_should() -> None:
    p = 2**-10
    mask = mask_of(plan_for(torch.float32, p), KEY, 1024, 4096)
    flips = np.array([count_bits(row, 32).sum() for row in mask])
    variance = 2**17 * p * (1 - p)
    z = (flips.var(ddof=1) / variance - 1) / np.sqrt(2 / 1023)
    assert abs(z) < 4.5


Key = Callable[[int, str, str, int], int]


def honest_key(seed: int, site: str, role: str, step: int) -> int:
    return int(step_key(site_key(seed, site, role), torch.tensor(step)))


def masks_by_source(key: Key, p: float) -> dict[str, Tensor]:
    """Masks that differ in one thing each: seed, site, tensor, step, sequence, virtual device."""
    plan = plan_for(torch.float32, p)
    site = "model.layers.0.mlp.up_proj"

    def draw(seed: int = 0, name: str = site, role: str = "input", step: int = 0, row: int = 0) -> Tensor:
        return mask_of(plan, key(seed, name, role, step), 1, 1 << 17, first_row=row)[0]

    return {
        "reference": draw(),
        "another seed": draw(seed=1),
        "another site": draw(name="model.layers.1.mlp.up_proj"),
        "another tensor": draw(role="weight"),
        "the next step": draw(step=1),
        "step 2^32": draw(step=2**32),
        "the next sequence": draw(row=1),
        "sequence 1000": draw(row=1000),
        "another device's weight": draw(role="weight", row=1),
    }


@pytest.mark.parametrize("p", [0.5, 0.3, 0.01])
def test_no_two_sources_share_flips(p: float) -> None:
    assert all_dependences(masks_by_source(honest_key, p), 32, p) == []


@pytest.mark.parametrize(
    ("mutant", "pair"),
    [
        (lambda seed, site, role, step: honest_key(seed, "layer", role, step), "another site and reference"),
        (lambda seed, site, role, step: honest_key(seed, site, "any", step), "another tensor and reference"),
        (lambda seed, site, role, step: honest_key(seed, site, role, 0), "reference and the next step"),
        (lambda seed, site, role, step: honest_key(seed, site, role, step % 2**32), "reference and step 2^32"),
    ],
)
def test_mutants_that_share_a_key_fail(mutant: Key, pair: str) -> None:
    problems = all_dependences(masks_by_source(mutant, 0.01), 32, 0.01)
    assert any(problem.startswith(pair) for problem in problems), problems


def test_splits_of_the_global_batch_draw_the_same_masks() -> None:
    plan = plan_for(torch.bfloat16, 0.05)

    def honest(first: int, count: int) -> dict[str, Tensor]:
        return {"input": mask_of(plan, KEY, count, 3_000, first), "weight": mask_of(plan, KEY + 1, 1, 3_000)}

    def rank_local_rows(first: int, count: int) -> dict[str, Tensor]:
        return {"input": mask_of(plan, KEY, count, 3_000, 0)}

    def rank_in_key(first: int, count: int) -> dict[str, Tensor]:
        return {"weight": mask_of(plan, KEY + first // 4, 1, 3_000)}

    assert split_problem(honest) is None
    assert split_problem(rank_local_rows) is not None
    assert split_problem(rank_in_key) is not None
