"""What `documents.yaml` calls: perplexity of whole documents, counted as lm-eval's wikitext counts them."""

from __future__ import annotations

import re
from typing import Any


def text(doc: dict[str, Any]) -> str:
    """The document, whole. A function, for lm-eval reads a template's result as Python when it looks like a literal."""
    return doc["text"]


def process_results(doc: dict[str, Any], results: tuple[float]) -> dict[str, tuple[float, int]]:
    """(log-likelihood, weight) of one document for each metric; nats, words and UTF-8 bytes."""
    (log_likelihood,) = results
    text = doc["text"]
    words, size = len(re.split(r"\s+", text)), len(text.encode("utf-8"))
    return {
        "word_perplexity": (log_likelihood, words),
        "byte_perplexity": (log_likelihood, size),
        "bits_per_byte": (log_likelihood, size),
    }
