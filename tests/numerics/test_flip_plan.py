"""The plan: exact probabilities, refusals, groups."""

from __future__ import annotations

from decimal import Decimal, localcontext

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline_lib.config.errors import UserError
from pipeline_lib.numerics.flip_plan import FLOAT_MASKS, exact_probability, float_plan, make_plan

PROBABILITIES = (0.5, 0.3, 2**-4, 0.01, 2**-10, 1e-4, 2**-16, 2**-20, 1e-9, 1e-12, 2**-48, 2**-50, 0.7, 0.999)


def relative_error(exact: Decimal, p: float) -> float:
    with localcontext(prec=90):
        return float(abs(exact / Decimal(p) - 1))


@pytest.mark.parametrize("p", PROBABILITIES)
@pytest.mark.parametrize("other", [0.0, 0.3, 1e-5, 1.0])
def test_probabilities_are_exact_to_better_than_two_to_minus_32(p: float, other: float) -> None:
    plan = float_plan("float32", p, other)
    for bit in (31, 23):
        assert relative_error(exact_probability(plan, bit), p) < 2**-32
    own = exact_probability(plan, 0)
    assert own == other if other in (0.0, 1.0) else relative_error(own, other) < 2**-32


@settings(max_examples=60, deadline=None)
@given(st.floats(2**-50, 1, exclude_min=False))
def test_any_probability_is_exact(p: float) -> None:
    assert relative_error(exact_probability(make_plan(8, [(0xFF, p)]), 3), p) < 2**-32


def test_a_wrong_table_would_be_noticed() -> None:
    assert relative_error(exact_probability(float_plan("float32", 0.005, 0.005), 0), 0.01) > 0.4
    assert relative_error(exact_probability(float_plan("float32", 0.01 * (1 + 2**-30), 0.01), 31), 0.01) > 2**-32


def test_zero_and_one_draw_nothing() -> None:
    assert float_plan("bfloat16", 0, 0).is_identity
    plan = float_plan("bfloat16", 1, 0)
    assert (plan.constant, plan.dense, plan.sparse) == (0xFF80FF80, (), ())


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan"), 2**-50 * 0.999, 5e-324])
def test_impossible_probabilities_are_refused_by_name(p: float) -> None:
    with pytest.raises(UserError, match=repr(p)):
        make_plan(32, [(1, p)])


@pytest.mark.parametrize(
    ("bits", "groups", "message"),
    [
        (64, [(1, 0.1)], "64"),
        (8, [(0x100, 0.1)], "0x100"),
        (8, [(0, 0.1)], "0x0"),
        (8, [(3, 0.1), (2, 0.2)], "meet"),
        (32, [(1 << i, 0.001 * (i + 1)) for i in range(15)], "14"),
    ],
)
def test_impossible_groups_are_refused(bits: int, groups: list[tuple[int, float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_plan(bits, groups)


def test_float64_is_refused() -> None:
    with pytest.raises(ValueError, match="float64"):
        float_plan("float64", 0.1, 0.1)


@pytest.mark.parametrize("dtype", FLOAT_MASKS)
def test_groups_partition_the_bits(dtype: str) -> None:
    bits, exponent, fraction = FLOAT_MASKS[dtype]
    assert exponent ^ fraction == 2**bits - 1
    assert exponent & fraction == 0


def test_equal_probabilities_need_one_component_and_plans_are_shared() -> None:
    plan = float_plan("float32", 1e-4, 1e-4)
    assert len(plan.sparse) == 1
    assert plan is float_plan("float32", 1e-4, 1e-4)
    assert len(float_plan("float32", 1e-4, 1e-3).sparse) == 2


@pytest.mark.parametrize(
    ("p", "expected"), [(2**-24, 8176), (2**-16, 5461), (2**-10, 248), (0.01, 25), (0.5, 8), (0.3, 1)]
)
def test_a_mask_takes_few_random_words(p: float, expected: int) -> None:
    """bf16 elements a Philox call, where earlier kernels take several calls for each element. A tile of 8,192 takes one
    for each component's count, one for four of its hits, and 1,024 for each dense step."""

    def elements_a_call(p_exp: float, p_frac: float) -> float:
        plan = float_plan("bfloat16", p_exp, p_frac)
        return 8192 / (1024 * len(plan.dense) + sum(1 + part.mean / 4 for part in plan.sparse))

    assert round(elements_a_call(p, p)) == expected
    assert elements_a_call(p, p / 2) > 0.45 * expected, "two groups do not cost twice as much"
