"""The work that a training does, and what it costs in reference time (RST) or FLOPs.

Reference system time (Kaddour et al., 2023, No Train No Gain, arXiv 2307.06440, section 3) is the sum, over the passes
that a training makes, of times measured beforehand on a reference machine. So a budget buys the same work wherever the
training runs. Counts are whole numbers of sequences; a cost is computed from all of them anew, so that no rounding
adds up and a resumed training goes on with the same numbers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["train", "forward", "hessian"]
"""A forward and backward pass with its share of the optimizer step, a forward pass alone (selection), and a pass that
estimates curvature (forward and backward)."""
Price = Callable[[str, int, int], float]
"""(kind, active layers, sequences) → seconds or FLOPs."""


@dataclass
class Work:
    """Sequences that went through a number of layers, by kind of pass.

    Attributes:
        charged: (kind, layers) → sequences that the budget pays for.
        free: the same for passes that an ablation does not charge.
    """

    charged: Counter[tuple[str, int]] = field(default_factory=Counter)
    free: Counter[tuple[str, int]] = field(default_factory=Counter)

    def add(self, kind: Kind, layers: int, sequences: int, free: bool = False) -> None:
        """Count passes of `sequences` sequences, over all ranks, through `layers` layers."""
        (self.free if free else self.charged)[kind, layers] += sequences

    def cost(self, price: Price, free: bool = False) -> float:
        """What the charged (or the free) passes cost."""
        counts = self.free if free else self.charged
        return math.fsum(price(kind, layers, count) for (kind, layers), count in sorted(counts.items()))

    def table(self) -> list[dict[str, Any]]:
        """One row a kind, number of layers and whether it was charged; JSON."""
        return [
            {"kind": kind, "layers": layers, "sequences": count, "charged": charged}
            for charged, counts in ((True, self.charged), (False, self.free))
            for (kind, layers), count in sorted(counts.items())
        ]

    def load(self, rows: list[dict[str, Any]]) -> None:
        """Take back what `table` gave."""
        self.charged.clear()
        self.free.clear()
        for row in rows:
            self.add(row["kind"], row["layers"], row["sequences"], free=not row["charged"])
