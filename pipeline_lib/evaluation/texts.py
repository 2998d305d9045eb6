"""Generated texts: their metrics, and texts of several arms side by side."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline_lib.evaluation.base import Arms
from pipeline_lib.evaluation.records import jsonl

BETTER = {"same_tokens": True, "same_prefix": True}
"""Metrics that are better when they are higher; what is better of the others depends on the reader."""


def compare(records: Sequence[dict[str, Any]], clean: Sequence[Mapping[str, Any]]) -> None:
    """Write into each record how its tokens agree with those of the clean text on the same prompt.

    `same`: positions with the same token; `prefix`: tokens before the first difference; `of`: tokens of the longer.
    """
    for record, other in zip(records, clean, strict=True):
        if record["before"] != other["before"]:
            raise ValueError("these texts continue different prompts")
        pairs = list(zip(record["tokens"], other["tokens"], strict=False))
        record["same"] = sum(a == b for a, b in pairs)
        record["prefix"] = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
        record["of"] = max(len(record["tokens"]), len(other["tokens"]))


def text_metrics(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Metrics of one run.

    same_tokens, same_prefix: share of token positions that agree with the clean text, at all and up to the first
    difference. distinct_1, distinct_2: different n-grams over all n-grams (Li et al., "A Diversity-Promoting Objective
    Function for Neural Conversation Models", 2016), 0 where there are none. tokens: mean length. finished: share
    that the model ended itself. not_finite: share of texts with a token chosen while logits held NaN or infinity.
    """
    texts = [record["tokens"] for record in records]
    of = sum(record["of"] for record in records)
    return {
        "same_tokens": sum(record["same"] for record in records) / of if of else 1.0,
        "same_prefix": sum(record["prefix"] for record in records) / of if of else 1.0,
        "distinct_1": distinct(texts, 1),
        "distinct_2": distinct(texts, 2),
        "tokens": sum(map(len, texts)) / len(texts),
        "finished": sum(record["finished"] for record in records) / len(records),
        "not_finite": sum(record["not_finite"] > 0 for record in records) / len(records),
    }


def distinct(texts: Sequence[Sequence[int]], n: int) -> float:
    """Different n-grams over all n-grams of the texts; 0.0 where there are none."""
    grams = [tuple(text[i : i + n]) for text in texts for i in range(len(text) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def as_jsonl(arms: Arms) -> str:
    """One line a text: arm, fault_seed (null for a clean one), and its record."""
    return jsonl(
        [
            {"arm": arm, "fault_seed": _fault_seed(run), **record}
            for arm, runs in arms.items()
            for run, records in runs.items()
            for record in records
        ]
    )


def as_markdown(arms: Arms, settings: Mapping[str, Any]) -> str:
    """A table a prompt: every arm and fault seed with its text and its agreement with the clean one."""
    sampled = [f"{key} {settings[key]}" for key in ("temperature", "top_k", "top_p", "seed")]
    how = f"Sampled with {', '.join(sampled)}" if settings["do_sample"] else "The most likely token each time"
    lines = [
        "# Texts",
        "",
        f"{how}, up to {settings['max_new_tokens']} tokens. Same: tokens at the same place as clean.",
    ]
    first = next(iter(next(iter(arms.values())).values()))
    for number, record in enumerate(first):
        lines += ["", f"## Prompt {number + 1}", "", f"> {_shown(record['before'])}", ""]
        lines += ["| setting | fault seed | same | text |", "| --- | ---: | ---: | --- |"]
        for arm, runs in arms.items():
            for run, records in runs.items():
                one, seed = records[number], _fault_seed(run)
                same = "" if run == "clean" else f"{one['same'] / one['of']:.0%}" if one["of"] else "100%"
                text = _shown(one["text"]) + (" ∎" if one["finished"] else "")
                lines.append(f"| {_shown(arm)} | {'' if seed is None else seed} | {same} | {text} |")
    return "\n".join(lines) + "\n"


def _fault_seed(run: str) -> int | None:
    return None if run == "clean" else int(run.removeprefix("seed-"))


def _shown(text: str) -> str:
    """`text` on one line of Markdown, every character of it to be seen."""
    text = "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text.replace("\t", "    "))
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*_{}\[\]#|~$])", r"\\\1", text)
    return text.strip("\n").replace("\n", "<br>") or " "
