"""Exact plans for independent random bit flips: decimal arithmetic only, so the same integers on every host.

Free of torch and numpy, so that settings can be validated while the Snakefile is parsed.

A plan describes the flip mask of a stream of 32-bit words as ``constant XOR dense XOR sparse``:

* constant: bits whose probability exceeds 1/2 are always flipped, and 1 - p goes on; p = 1 ends here.
* dense: a dyadic part a / 2^k by k random words and a majority chain, only where p > 0.035.
* sparse: "Poisson parity". In a tile of B = 2^17 bits, N ~ Poisson(rate * B) hits fall uniformly and with
  replacement, each toggling one bit. Counts per bit are independent Poisson(rate) (splitting), and
  P(odd) = (1 - exp(-2 rate)) / 2, so rate = -ln(1 - 2 eps) / 2 makes every bit an independent Bernoulli(eps).
  Several groups of bits: rates add, so component 0 has the smallest rate on all groups, component 1 what the
  larger ones have more, and so on.
* XOR of independent parts: 1 - 2p = (1 - 2 a/2^k) (1 - 2 eps).

The only approximation is that the thresholds of N are rounded to 2^-64.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Context, Decimal, localcontext
from functools import cached_property, lru_cache
from itertools import pairwise

from pipeline_lib.config.errors import UserError

TILE_WORDS = 4096
"""32-bit words of a tile."""
TILE_BITS_LOG2 = 17
"""log2 of the bits of a tile."""
SMALLEST = 2.0**-50
"""The smallest probability (0 apart) that a plan realises to better than 2^-32 relative."""

FLOAT_MASKS = {
    "float32": (32, 0xFF800000, 0x007FFFFF),
    "float16": (16, 0xFC00, 0x03FF),
    "bfloat16": (16, 0xFF80, 0x007F),
}
"""dtype name -> (element bits, sign-and-exponent mask, fraction mask)."""

_MOST_COMPONENTS = 14  # what the four top bits of counter word 3 leave beside the dense part
_SPARSE_LIMIT = Decimal("0.035")  # the largest probability left to the sparse part
_HIT_COST = 320  # cost of one unit of sparse probability in dense steps; part of the stream's definition
_TAIL = Decimal(2) ** -66


def probability_problem(p: float) -> str | None:
    """What is wrong with `p` as a flip probability, in words; None when it is exactly realisable."""
    if isinstance(p, bool) or not isinstance(p, (int, float)) or math.isnan(p):
        return f"{p!r} is not a probability; allowed is a number from 0 to 1"
    if not 0 <= p <= 1:
        return f"probability {p!r} is outside [0, 1]"
    if 0 < p < SMALLEST:
        return (
            f"probability {p!r} is below 2^-50 ({SMALLEST:.3g}), the smallest that is drawn exactly; "
            "allowed are 0 and every value from 2^-50 to 1"
        )
    return None


@dataclass(frozen=True, eq=False)
class Component:
    """One Poisson-parity component: hits of rate `rate` per bit, kept where `mask` (32 bits) is set.

    The count of a tile is N = base + #{j : u >= thresholds[j]} for u uniform in [0, 2^64).
    `tag` is counter word 3 of its random words.
    """

    mask: int
    rate: Decimal
    base: int
    thresholds: tuple[int, ...]
    tag: int

    @property
    def mean(self) -> float:
        """Expected hits of a tile."""
        return float(self.rate * 2**TILE_BITS_LOG2)

    @cached_property
    def likely_count(self) -> int:
        """A count that a tile exceeds with a chance of at most about 2^-12."""
        return self.base + bisect_left(self.thresholds, 2**64 - 2**52)


@dataclass(frozen=True, eq=False)
class FlipPlan:
    """How the bits of elements of `bits` bits (8, 16 or 32) flip: group `masks[i]` with `probabilities[i]`.

    Made by `make_plan`, which returns the same object for the same arguments. `constant`, `dense` (from the
    least significant binary digit) and the component masks are 32-bit words, repeated over the elements of a word.
    """

    bits: int
    masks: tuple[int, ...]
    probabilities: tuple[float, ...]
    constant: int
    dense: tuple[int, ...]
    sparse: tuple[Component, ...]

    @property
    def is_identity(self) -> bool:
        """Whether no bit ever flips."""
        return self.constant == 0 and len(self.dense) == 0 and len(self.sparse) == 0


def make_plan(bits: int, groups: Sequence[tuple[int, float]]) -> FlipPlan:
    """The plan for elements of `bits` bits whose disjoint groups (bit mask, probability) flip; other bits never do.

    Raises:
        UserError: a probability outside [0, 1] or in (0, 2^-50).
        ValueError: a width other than 8, 16, 32, a mask outside it, masks that meet, or more than 14 different
            probabilities.
    """
    return _make_plan(bits, tuple(int(mask) for mask, _ in groups), tuple(float(p) for _, p in groups))


def float_plan(dtype: str, p_exp: float, p_frac: float) -> FlipPlan:
    """The plan for `float32`, `float16` or `bfloat16`: one p for exponent and sign bits, one for fraction bits."""
    if dtype not in FLOAT_MASKS:
        raise ValueError(f"no sign, exponent and fraction bits known for {dtype!r}; allowed: {', '.join(FLOAT_MASKS)}")
    bits, exponent, fraction = FLOAT_MASKS[dtype]
    return _make_plan(bits, (exponent, fraction), (float(p_exp), float(p_frac)))


@lru_cache(maxsize=1024)
def _make_plan(bits: int, masks: tuple[int, ...], probabilities: tuple[float, ...]) -> FlipPlan:
    _check(bits, masks, probabilities)
    copies = sum(1 << shift for shift in range(0, 32, bits))
    words = [mask * copies for mask in masks]
    with localcontext(Context(prec=70, Emin=-999_999, Emax=999_999)):
        constant, digits, rates = 0, [], []
        for word, p in zip(words, probabilities, strict=True):
            exact = Decimal(p)
            if exact > Decimal(1) / 2:
                constant |= word
                exact = 1 - exact
            k, a, eps = _split(exact)
            digits.append((k, a))
            rates.append(-((1 - 2 * eps).ln()) / 2 if eps else Decimal(0))
        sparse = _components(words, rates)
    return FlipPlan(bits, masks, probabilities, constant, _dense_words(words, digits), sparse)


def _check(bits: int, masks: tuple[int, ...], probabilities: tuple[float, ...]) -> None:
    if bits not in (8, 16, 32):
        raise ValueError(f"elements of {bits} bits cannot flip; allowed: 8, 16, 32")
    seen = 0
    for mask in masks:
        if not 0 < mask < 2**bits:
            raise ValueError(f"bit mask {mask:#x} does not fit an element of {bits} bits")
        if mask & seen:
            raise ValueError(f"bit masks {[hex(m) for m in masks]} meet; allowed are disjoint groups")
        seen |= mask
    for p in probabilities:
        if problem := probability_problem(p):
            raise UserError(problem, value=p, allowed=f"0, and from 2^-50 ({SMALLEST:.3g}) to 1", fix="change p")


def _split(p: Decimal) -> tuple[int, int, Decimal]:
    """p <= 1/2 as (k, a, eps): dense a / 2^k XOR sparse eps, at the least estimated cost."""
    best: tuple[Decimal, int, int, Decimal] | None = None
    for k in range(17):
        a = int(p * 2**k)
        rest = 1 - 2 * Decimal(a) / 2**k
        if rest == 0 and p != Decimal(1) / 2:
            continue
        eps = (p - Decimal(a) / 2**k) / rest if rest else Decimal(0)
        cost = k + _HIT_COST * eps
        if eps <= _SPARSE_LIMIT and (best is None or cost < best[0]):
            best = (cost, k, a, eps)
    if best is None:
        raise AssertionError(f"no split of {p}")  # k = 16 leaves eps < 2^-15
    return best[1:]


def _dense_words(words: list[int], digits: list[tuple[int, int]]) -> tuple[int, ...]:
    """Word j holds ones in the groups whose binary digit j of a / 2^K is one, j from the least significant."""
    longest = max((k for k, _ in digits), default=0)
    return tuple(
        sum(word for word, (k, a) in zip(words, digits, strict=True) if (a << (longest - k)) >> j & 1)
        for j in range(longest)
    )


def _components(words: list[int], rates: list[Decimal]) -> tuple[Component, ...]:
    found: list[Component] = []
    below = Decimal(0)
    for rate in sorted({rate for rate in rates if rate > 0}):
        index = len(found)
        if index == _MOST_COMPONENTS:
            raise ValueError(f"more than {_MOST_COMPONENTS} different probabilities in one element")
        mask = sum(word for word, own in zip(words, rates, strict=True) if own >= rate)
        # 2 << 28 belongs to the dense part, so components from the third on come after it.
        tag = (index if index < 2 else index + 1) << 28
        found.append(Component(mask, rate - below, *_poisson_table((rate - below) * 2**TILE_BITS_LOG2), tag))
        below = rate
    return tuple(found)


def _poisson_table(mean: Decimal) -> tuple[int, tuple[int, ...]]:
    """(base, thresholds) of the inverse distribution function, rounded to 2^-64; tails below 2^-66 are left off."""
    thresholds: list[int] = []
    base = count = 0
    mass, total = (-mean).exp(), Decimal(0)
    while True:
        total += mass
        if total > _TAIL:
            if not thresholds:
                base = count
            threshold = int((total * 2**64).to_integral_value())
            if threshold >= 2**64 or (count > mean and 1 - total < _TAIL):
                return base, tuple(thresholds)
            thresholds.append(threshold)
        count += 1
        mass = mass * mean / count


def exact_probability(plan: FlipPlan, bit: int) -> Decimal:
    """The probability with which the plan's integer algorithm flips bit `bit` of an element, to about 60 digits.

    A tile's count is n with probability (T_n - T_(n-1)) / 2^64, and a bit is toggled an odd number of times by n
    uniform hits with probability (1 - (1 - 2/B)^n) / 2.
    """
    selected = 1 << bit
    with localcontext(Context(prec=90, Emin=-999_999, Emax=999_999)):
        dense = Decimal(0)
        for word in plan.dense:
            dense = (dense + 1) / 2 if word & selected else dense / 2
        bias = 1 - 2 * dense
        for component in plan.sparse:
            if component.mask & selected:
                bias *= 1 - 2 * _odd_probability(component)
        if plan.constant & selected:
            bias = -bias
        return (1 - bias) / 2


def _odd_probability(component: Component) -> Decimal:
    keep = 1 - Decimal(2) / 2**TILE_BITS_LOG2
    edges = (0, *component.thresholds, 2**64)
    power = keep**component.base
    odd = Decimal(0)
    for low, high in pairwise(edges):
        odd += (high - low) * (1 - power) / 2
        power *= keep
    return odd / 2**64
