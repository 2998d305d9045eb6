"""Statistical checks on flips. Each returns what is wrong, in words, or None; seeds are fixed, so answers are too."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline_lib.numerics.bitflips import FlipPlan, flip
from pipeline_lib.numerics.flip_reference import Window, sparse_hits

Z = 4.5  # two-sided, 7e-6 a check
INTEGER = {8: torch.int8, 16: torch.int16, 32: torch.int32}


def group_bits(mask: int) -> list[int]:
    """The bits of a group."""
    return [bit for bit in range(32) if mask >> bit & 1]


def mask_of(plan: FlipPlan, key: int, rows: int, elements: int, first_row: int = 0, first_element: int = 0) -> Tensor:
    """The flip mask itself, integers [rows, elements]."""
    zeros = torch.zeros(rows, elements, dtype=INTEGER[plan.bits])
    return flip(zeros, plan, torch.tensor(key), first_row, first_element)


def count_bits(mask: Tensor, bits: int) -> np.ndarray:
    """How often each bit is set in a mask; int64 [bits]."""
    hit = mask.reshape(-1).numpy()
    hit = hit[hit != 0]
    return np.array([np.count_nonzero(hit >> bit & 1) for bit in range(bits)])


def count_sparse(plan: FlipPlan, key: int, rows: int, elements: int) -> np.ndarray:
    """`count_bits` of a mask too large for memory, from the positions of its hits; plans without dense part."""
    assert not plan.dense
    assert not plan.constant
    positions = []
    for component in plan.sparse:
        index, bit = sparse_hits(component, plan.bits, Window(key, 0, rows, 0, elements))
        positions.append(index * 32 + np.log2(bit.astype(np.float64)).astype(np.int64))
    places, times = np.unique(np.concatenate(positions), return_counts=True)
    return np.bincount(places[times % 2 == 1] % 32, minlength=plan.bits)[: plan.bits]


def rate_problem(counts: np.ndarray, elements: int, mask: int, p: float) -> str | None:
    """Whether the flips of a group can come from probability p: in total, and alike in each of its bits.

    Args:
        counts: int64 [bits], of `elements` elements.
        mask: the group.
    """
    own = counts[group_bits(mask)]
    if p in (0.0, 1.0):
        return None if (own == p * elements).all() else f"p = {p}: flips {own.tolist()} of {elements}"
    trials, expected = elements * len(own), elements * len(own) * p
    if expected < 1e4:
        raise AssertionError(f"{expected:.0f} expected flips are too few to test p = {p}")
    z = (own.sum() - expected) / math.sqrt(trials * p * (1 - p))
    if abs(z) > Z:
        return f"p = {p}: {own.sum()} flips instead of {expected:.0f}, z = {z:.1f}"
    chi2 = float(((own - elements * p) ** 2 / (elements * p * (1 - p))).sum())
    tail = float(torch.special.gammaincc(torch.tensor(len(own) / 2), torch.tensor(chi2 / 2)))
    if not 1e-5 < tail < 1 - 1e-5:
        return f"p = {p}: bits flip unequally, chi-square {chi2:.1f} of {len(own)}, tail {tail:.1e}"
    return None


def dependence_problem(a: Tensor, b: Tensor, bits: int, p: float) -> str | None:
    """Whether two masks of probability p coincide more or less often than independent ones."""
    trials = a.numel() * bits
    both = int(count_bits(a & b, bits).sum())
    expected = trials * p * p
    if expected < 100:
        raise AssertionError(f"{expected:.0f} expected coincidences are too few to test")
    z = (both - expected) / math.sqrt(expected * (1 - p * p))
    return None if abs(z) < Z else f"{both} coincidences instead of {expected:.0f}, z = {z:.1f}"


def all_dependences(masks: dict[str, Tensor], bits: int, p: float) -> list[str]:
    """`dependence_problem` of all pairs of masks, by name."""
    names = sorted(masks)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    problems = {(a, b): dependence_problem(masks[a], masks[b], bits, p) for a, b in pairs}
    return [f"{a} and {b}: {problem}" for (a, b), problem in problems.items() if problem]


SPLITS = {"1 x 8": [(0, 8)], "2 x 4": [(0, 4), (4, 4)], "1 x 2 x 4": [(0, 2), (2, 2), (4, 2), (6, 2)]}
"""Ranks and micro-batches of a global batch of 8: (first sequence, sequences) of each forward pass."""


def split_problem(masks: Callable[[int, int], dict[str, Tensor]]) -> str | None:
    """Whether the masks of a global batch of 8 depend on how it is cut.

    Args:
        masks: (first sequence, sequences) -> the masks of that forward pass by name, [sequences, ...] or, where one
            weight serves all, [1, ...].
    """
    seen: dict[str, dict[str, Tensor]] = {}
    for name, parts in SPLITS.items():
        drawn = [masks(first, count) for first, count in parts]
        seen[name] = {tensor: _joined([part[tensor] for part in drawn], parts) for tensor in drawn[0]}
    reference = seen["1 x 8"]
    for name, found in seen.items():
        wrong = [tensor for tensor in reference if not torch.equal(found[tensor], reference[tensor])]
        if wrong:
            return f"{name} draws other masks than 1 x 8 for {wrong}"
    return None


def _joined(parts: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> Tensor:
    """The masks of the 8 sequences."""
    return torch.cat([part.expand(size, *part.shape[1:]) for part, (_, size) in zip(parts, sizes, strict=True)])
