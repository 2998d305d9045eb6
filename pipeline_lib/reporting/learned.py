"""How much a language model has learned: its perplexity beside that of an untrained and of a unigram model."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline_lib.artifacts.files import read_json
from pipeline_lib.data.tokens import TokenShards


@dataclass(frozen=True)
class Learned:
    """Token perplexities.

    Attributes:
        initial: before the first update, on the first training batch.
        final: on the test split, from the evaluation's bits per byte.
        unigram: of the training split's token frequencies (add-one smoothed), on the test split.
    """

    initial: float
    final: float
    unigram: float


def learned(result: Path, train: Path, tokens: Path, dataset: Path) -> Learned:
    """Compare, from four artifacts.

    Args:
        result: a result artifact with metric bits_per_byte over the dataset's test split.
        train: the train artifact of the same experiment, with its log.
        tokens, dataset: the artifacts it was trained on.
    """
    with open(train / "log" / "metrics.jsonl", encoding="utf-8") as log:
        first = json.loads(log.readline())
    bits = read_json(result / "result.json")["result"]["clean"]["metrics"]["bits_per_byte"]["mean"]
    test = TokenShards(tokens, "test")
    size = read_json(dataset / "dataset.json")["result"]["bytes"]["test"]
    return Learned(
        initial=math.exp(first["loss"]),
        final=math.exp(bits * math.log(2) * size / test.n_tokens),
        unigram=unigram_perplexity(TokenShards(tokens, "train"), test),
    )


def unigram_perplexity(train: TokenShards, test: TokenShards) -> float:
    """Perplexity of `test` under the add-one smoothed token frequencies of `train`."""
    counts = np.ones(train.vocab_size)
    for start in range(0, train.n_tokens, 2**24):
        part = train.read(start, min(2**24, train.n_tokens - start))
        counts += np.bincount(part, minlength=train.vocab_size)
    logs = np.log(counts / counts.sum())
    return math.exp(-float(logs[test.read(0, test.n_tokens)].mean()))
