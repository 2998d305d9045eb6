"""Verdicts by hand, their error rates and power against simulation, planted differences."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pipeline_lib.reporting.verdicts import (
    BETTER,
    EQUAL,
    UNDECIDED,
    WORSE,
    detectable,
    interval,
    pooled,
    power_of_difference,
    power_of_equality,
    verdict,
)

BASE = [3.0, 3.5, 4.0]


def near(difference: float, spread: float) -> list[float]:
    """The baseline with differences difference − spread, difference, difference + spread."""
    return [value + difference + off for value, off in zip(BASE, (-spread, 0.0, spread), strict=True)]


def test_by_hand() -> None:
    """Three differences m − s, m, m + s have standard deviation s; t(0.975, 2) = 4.30265, t(0.95, 2) = 2.91999."""
    found = verdict(near(-0.5, 0.1), BASE, 0.2, higher_is_better=False)
    assert (found.word, found.n) == (BETTER, 3)
    assert found.difference == pytest.approx(-0.5)
    assert found.deviation == pytest.approx(0.1)
    half = 4.302652729911275 * 0.1 / math.sqrt(3)
    assert (found.low, found.high) == (pytest.approx(-0.5 - half), pytest.approx(-0.5 + half))
    assert interval([1.0, 2.0, 3.0])[1:] == (
        pytest.approx(2 - 4.302652729911275 / 3**0.5),
        pytest.approx(2 + 4.302652729911275 / 3**0.5),
    )


@pytest.mark.parametrize(
    ("difference", "spread", "higher", "word"),
    [
        (0.5, 0.1, False, WORSE),
        (0.5, 0.1, True, BETTER),
        (-0.5, 0.1, True, WORSE),
        (0.0, 0.1, False, EQUAL),  # 2.92 · 0.1/√3 = 0.169 < 0.2
        (0.0, 0.12, False, UNDECIDED),  # 0.202
        (0.04, 0.01, False, EQUAL),  # sure, and too small to matter
        (0.25, 0.11, False, UNDECIDED),  # 4.30 · 0.11/√3 = 0.273
        (0.25, 0.10, False, WORSE),  # 0.248
        (0.1, 0.0, False, EQUAL),
        (0.3, 0.0, False, WORSE),
    ],
)
def test_words(difference: float, spread: float, higher: bool, word: str) -> None:
    assert verdict(near(difference, spread), BASE, 0.2, higher).word == word


def test_what_is_not_finite_is_worse() -> None:
    assert verdict([3.0, math.nan, 4.0], BASE, 0.2, False).word == WORSE
    assert verdict(BASE, [3.0, math.inf, 4.0], 0.2, False).word == UNDECIDED
    assert math.isnan(interval([1.0, math.nan])[1])


def test_bad_input_is_refused() -> None:
    for arm, base, delta in (([1.0], [1.0], 0.1), ([1.0, 2.0], BASE, 0.1), (BASE, BASE, 0.0)):
        with pytest.raises(ValueError, match="two seeds"):
            verdict(arm, base, delta, False)


@pytest.mark.parametrize("n", [3, 5])
@pytest.mark.parametrize(("true", "words"), [(0.0, EQUAL), (1.0, WORSE), (-1.0, BETTER)])
def test_power_is_how_often_planted_differences_are_found(n: int, true: float, words: str) -> None:
    """2,000 comparisons with noise σ and δ = 1: as often as stated, and the opposite is hardly ever said."""
    rng, sigma, draws = np.random.default_rng(n), 0.3, 2000
    found = [
        verdict([float(x) for x in true + sigma * rng.standard_normal(n)], [0.0] * n, 1.0, False).word
        for _ in range(draws)
    ]
    share = found.count(words) / draws
    stated = power_of_equality(1.0, sigma, n) if words == EQUAL else power_of_difference(1.0, sigma, n)
    # At a true difference of δ itself TOST says `equal` in 5 % of the cases, and these come first.
    slack = 4 * math.sqrt(stated * (1 - stated) / draws) + (0.0 if words == EQUAL else 0.055)
    assert abs(share - stated) <= slack, (share, stated)
    opposite = {WORSE: BETTER, BETTER: WORSE}.get(words)
    assert opposite is None or found.count(opposite) / draws <= 0.001


def test_chance_calls_no_difference_more_often_than_stated() -> None:
    rng, draws = np.random.default_rng(7), 2000
    words = [verdict([float(x) for x in rng.standard_normal(3)], [0.0] * 3, 1e-9, False).word for _ in range(draws)]
    wrong = (words.count(BETTER) + words.count(WORSE)) / draws
    assert abs(wrong - 0.05) < 4 * math.sqrt(0.05 * 0.95 / draws)


def test_detectable_is_the_inverse_of_power() -> None:
    size = detectable(0.02, 3)
    assert power_of_difference(size, 0.02, 3) == pytest.approx(0.8, abs=1e-6)
    assert detectable(0.02, 5) < size
    assert (detectable(0.0, 3), power_of_difference(1.0, 0.0, 3), power_of_equality(1.0, 0.0, 3)) == (0.0, 1.0, 1.0)
    assert pooled([3.0, 4.0, math.nan]) == pytest.approx(math.sqrt(12.5))
