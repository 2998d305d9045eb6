"""The unigram baseline against a hand-made count."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pipeline_lib.reporting.learned import unigram_perplexity


class Shards:
    """As much of TokenShards as the baseline reads."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = np.array(tokens, np.uint16)
        self.n_tokens, self.vocab_size = len(tokens), 4

    def read(self, start: int, count: int) -> np.ndarray:
        return self.tokens[start : start + count]


def test_unigram_perplexity() -> None:
    train, test = Shards([0, 0, 0, 1, 1, 2]), Shards([0, 1, 3])
    expected = math.exp(-(math.log(4 / 10) + math.log(3 / 10) + math.log(1 / 10)) / 3)
    assert unigram_perplexity(train, test) == pytest.approx(expected)  # type: ignore[arg-type]
