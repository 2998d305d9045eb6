"""Whether one arm of a comparison is better than another, equal within a margin, or worse; and what it could have seen.

Arms are compared seed by seed: the same seed means the same data and initial weights, so differences are paired.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

BETTER, EQUAL, WORSE, UNDECIDED = "better", "equal within δ", "worse", "undecided"
LEVEL = 0.05


@dataclass(frozen=True)
class Verdict:
    """An arm against the baseline.

    Attributes:
        word: `better`, `equal within δ`, `worse` or `undecided`.
        difference: mean of arm − baseline over seeds; not a number where an arm has no finite value.
        low, high: ends of its 1 − level confidence interval.
        deviation: standard deviation of the differences.
        n: seeds.
    """

    word: str
    difference: float
    low: float
    high: float
    deviation: float
    n: int


def verdict(
    arm: Sequence[float], baseline: Sequence[float], delta: float, higher_is_better: bool, level: float = LEVEL
) -> Verdict:
    """Judge an arm by its values and the baseline's, one a seed, in the same order.

    `equal within δ`: two one-sided t tests reject a difference of −δ and of δ, each at `level` (TOST: Schuirmann, 1987,
    J. Pharmacokinet. Biopharm. 15:657); this comes first, since such a difference does not matter even where it is
    sure. Else `better` or `worse`: a two-sided paired t test rejects a difference of 0 at `level`. Else `undecided`. An
    arm that ended without a finite value at some seed is `worse`, unless the baseline did so too.

    Raises:
        ValueError: fewer than two seeds, other seeds than the baseline's, or a margin that is not positive.
    """
    n = len(arm)
    if n < 2 or n != len(baseline) or not delta > 0:
        raise ValueError(f"needs two seeds or more, the same for both, and δ > 0: {n}, {len(baseline)}, {delta}")
    whole = [all(map(math.isfinite, values)) for values in (arm, baseline)]
    if not all(whole):
        return Verdict(UNDECIDED if not whole[1] else WORSE, math.nan, math.nan, math.nan, math.nan, n)
    differences = [value - other for value, other in zip(arm, baseline, strict=True)]
    mean = math.fsum(differences) / n
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in differences) / (n - 1))
    error = deviation / math.sqrt(n)
    wide, narrow = _t(1 - level / 2, n - 1) * error, _t(1 - level, n - 1) * error
    if mean - narrow > -delta and mean + narrow < delta:
        word = EQUAL
    elif abs(mean) > wide:
        word = BETTER if (mean > 0) == higher_is_better else WORSE
    else:
        word = UNDECIDED
    return Verdict(word, mean, mean - wide, mean + wide, deviation, n)


def interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, float, float]:
    """(mean, low, high) of the 1 − level t interval; low and high are not numbers for one value or for NaN."""
    n, mean = len(values), sum(values) / len(values)
    if n < 2 or not all(map(math.isfinite, values)):
        return mean, math.nan, math.nan
    error = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)
    half = _t(1 - level / 2, n - 1) * error
    return mean, mean - half, mean + half


def power_of_difference(delta: float, deviation: float, n: int, level: float = LEVEL) -> float:
    """How likely a true difference of `delta` is seen as one, on its side: the noncentral t distribution's tail.

    Args:
        deviation: standard deviation of paired differences.
    """
    from scipy.stats import nct

    if deviation == 0:
        return 1.0
    return float(nct.sf(_t(1 - level / 2, n - 1), n - 1, delta * math.sqrt(n) / deviation))


def power_of_equality(delta: float, deviation: float, n: int, level: float = LEVEL) -> float:
    """How likely two arms that do not differ are found equal within `delta`.

    TOST says so where |mean| < δ − t·s/√n; mean and s are independent, so this is the probability of that given s,
    averaged over the χ distribution of s.
    """
    from scipy.integrate import quad
    from scipy.stats import chi2, norm

    if deviation == 0:
        return 1.0
    df, root, t = n - 1, math.sqrt(n), _t(1 - level, n - 1)
    most = df * (delta * root / (t * deviation)) ** 2  # of (n−1)s²/σ²

    def given(spread: float) -> float:
        half = (delta * root / deviation) - t * math.sqrt(spread / df)
        return float((2 * norm.cdf(half) - 1) * chi2.pdf(spread, df))

    return float(quad(given, 0, min(most, chi2.isf(1e-12, df)), limit=200)[0])


def detectable(deviation: float, n: int, power: float = 0.8, level: float = LEVEL) -> float:
    """The smallest true difference that is seen as one with this probability."""
    from scipy.optimize import brentq

    if deviation == 0:
        return 0.0
    found = brentq(lambda size: power_of_difference(size * deviation, deviation, n, level) - power, 1e-6, 1e3)
    return float(found) * deviation  # type: ignore[arg-type]


def pooled(deviations: Sequence[float]) -> float:
    """One standard deviation for cells with equal numbers of seeds: the root of their mean variance; NaN left out."""
    finite = [value for value in deviations if math.isfinite(value)]
    return math.sqrt(sum(value**2 for value in finite) / len(finite)) if finite else math.nan


def _t(share: float, df: int) -> float:
    from scipy.stats import t

    return float(t.ppf(share, df))
