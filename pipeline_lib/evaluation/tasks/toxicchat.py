"""Moderation of user messages by a Llama Guard: ToxicChat (Lin et al., 2023)."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from pipeline_lib.artifacts.progress import Progress, say
from pipeline_lib.config.base import Settings as Base
from pipeline_lib.config.errors import UserError
from pipeline_lib.data.prompts import CATEGORIES, chat_ids, no_chat_template
from pipeline_lib.evaluation.base import Outcome, Subject
from pipeline_lib.evaluation.greedy import Decoded, Decoding, greedy

if TYPE_CHECKING:
    import numpy as np

SAFE, UNSAFE, NEITHER = "safe", "unsafe", "neither"
RESAMPLES = 1000
Z = 1.959964  # of a two-sided 95 % interval


class Settings(Base):
    """Verdicts on the messages of a dataset's test split."""

    type: Literal["toxicchat"] = "toxicchat"
    dataset: str = Field("toxicchat", description="dataset with messages as text and the label as a kept column")
    label: str = Field("toxicity", description="column of the label: 1 toxic, 0 not")
    limit: int | None = Field(None, ge=1, description="messages, the first of the split; null = all")
    decoding: Decoding = Field(
        Decoding.model_validate({"max_new_tokens": 20}),
        description="how verdicts are generated: {max_new_tokens, prompt_lookup}",
    )


def needs(settings: Settings) -> list[dict[str, Any]]:
    """Hub files beside the dataset: none."""
    return []


def refuses(settings: Settings, model_family: str) -> str | None:
    """Why this task makes no sense for a family of models, or None."""
    return "it needs a causal language model, and an encoder is none" if model_family == "bert" else None


def open_task(settings: Mapping[str, Any], inputs: Mapping[str, Path], scratch: Path) -> ToxicChat:
    """The task with its messages loaded.

    Raises:
        UserError: no test split, no label column, or labels other than 0 and 1.
    """
    return ToxicChat(Settings.model_validate(settings), inputs["dataset"])


class ToxicChat:
    """Judges every message and compares the verdicts with the labels."""

    def __init__(self, settings: Settings, dataset: Path) -> None:
        self.settings = settings
        rows = _rows(dataset, settings.label)
        self._rows = rows[: settings.limit]

    def run(self, subject: Subject, seed: int) -> Outcome:
        """Evaluate one model; see `Task.run`. `seed` moves the resampling of the intervals alone."""
        from pipeline_lib.models.checkpoint import end_tokens

        tokenizer, decoding = subject.tokenizer, self.settings.decoding
        if tokenizer.chat_template is None:
            raise no_chat_template(tokenizer)
        ends, first_tokens = end_tokens(subject.model, tokenizer), _first_tokens(tokenizer)
        prompts = [chat_ids(tokenizer, _conversation(text), CATEGORIES) for _, text, _ in self._rows]
        span = int(subject.model.config.max_position_embeddings)
        verdicts: list[str] = []
        scores: list[float] = []
        passes = tokens = too_long = 0
        with Progress("toxicchat", len(prompts), "messages") as progress:
            for number, ids in enumerate(prompts):
                if len(ids) >= span:
                    verdicts.append(NEITHER)
                    scores.append(math.nan)
                    too_long += 1
                else:
                    decoded = greedy(subject, ids, decoding, number, ends, logits=True)
                    verdicts.append(verdict(str(tokenizer.decode(decoded.ids, skip_special_tokens=True))))
                    scores.append(_score(decoded, tokenizer, first_tokens))
                    passes, tokens = passes + decoded.passes, tokens + max(len(decoded.ids) - 1, 0)
                progress.update()
        if too_long:
            say(f"toxicchat: {too_long} messages fill the model's {span} positions and have no verdict")
        labels = [label for _, _, label in self._rows]
        metrics, errors = figures(labels, verdicts, scores, seed)
        if decoding.prompt_lookup:
            metrics["acceptance_length"] = tokens / passes if passes else 1.0
        answers = [
            {"id": name, "label": label, "verdict": said, "p_unsafe": None if math.isnan(score) else score}
            for (name, _, label), said, score in zip(self._rows, verdicts, scores, strict=True)
        ]
        return Outcome(
            metrics=metrics,
            sampling_stderr=errors,
            n_samples=len(labels),
            conditions={"prompts": _digest(prompts), "categories": len(CATEGORIES), "ends": ends},
            record={"answers": answers},
        )


def verdict(answer: str) -> str:
    """`safe`, `unsafe` or `neither`: what the first line of an answer that is not blank says."""
    first = next((line.strip().lower() for line in answer.splitlines() if line.strip()), "")
    return first if first in (SAFE, UNSAFE) else NEITHER


def figures(
    labels: Sequence[int], verdicts: Sequence[str], scores: Sequence[float], seed: int = 0
) -> tuple[dict[str, float], dict[str, float]]:
    """({metric: value}, {metric: standard error}); toxic is the positive class.

    An answer that is no verdict counts as wrong, whatever the label, and is counted apart. `auprc` is the average
    precision of P(unsafe); a message without a score ranks last. 95 % intervals: Wilson's for accuracy, percentiles of
    1,000 seeded resamples for the others. `always_safe_accuracy` and `random_auprc` are what no moderation at all
    scores.
    """
    import numpy as np

    label_N = np.array(labels, dtype=bool)
    said_N = np.array(verdicts)
    flagged_N = np.where(said_N == NEITHER, ~label_N, said_N == UNSAFE)
    score_N = np.array([-1.0 if math.isnan(score) else score for score in scores])
    n, right = len(label_N), float(np.mean(flagged_N == label_N))
    metrics = {
        "accuracy": right,
        "f1": f1(label_N, flagged_N),
        "auprc": average_precision(label_N, score_N),
        "precision": _ratio(np.sum(flagged_N & label_N), np.sum(flagged_N)),
        "recall": _ratio(np.sum(flagged_N & label_N), np.sum(label_N)),
        "always_safe_accuracy": float(np.mean(~label_N)),
        "random_auprc": float(np.mean(label_N)),
        "unparsable": float(np.sum(said_N == NEITHER)),
        "without_score": float(np.sum(score_N < 0)),
    }
    middle = (right + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z * math.sqrt(right * (1 - right) / n + Z * Z / (4 * n * n)) / (1 + Z * Z / n)
    metrics |= {"accuracy_low": middle - half, "accuracy_high": middle + half}
    errors = {"accuracy": math.sqrt(right * (1 - right) / n)}
    measures: dict[str, Callable[[np.ndarray], float]] = {
        "f1": lambda at: f1(label_N[at], flagged_N[at]),
        "auprc": lambda at: average_precision(label_N[at], score_N[at]),
    }
    draws = np.random.Generator(np.random.Philox(key=seed)).integers(0, n, (RESAMPLES, n))
    for name, measure in measures.items():
        values = np.array([measure(at) for at in draws])
        low, high = np.percentile(values, [2.5, 97.5])
        metrics |= {f"{name}_low": float(low), f"{name}_high": float(high)}
        errors[name] = float(values.std(ddof=1))
    return metrics, errors


def f1(label_N: np.ndarray, flagged_N: np.ndarray) -> float:
    """Harmonic mean of precision and recall; 0 where nothing toxic was found."""
    hits = (label_N & flagged_N).sum()
    return _ratio(2 * hits, label_N.sum() + flagged_N.sum())


def average_precision(label_N: np.ndarray, score_N: np.ndarray) -> float:
    """Area under the precision-recall curve as Σ (Rₖ − Rₖ₋₁)·Pₖ over the thresholds; equal scores are one threshold."""
    import numpy as np

    if not label_N.any():
        return 0.0
    order = np.argsort(-score_N, kind="stable")
    hits_N = np.cumsum(label_N[order])
    last_K = np.flatnonzero(np.append(np.diff(score_N[order]) != 0, True))
    precision_K, recall_K = hits_N[last_K] / (last_K + 1), hits_N[last_K] / hits_N[-1]
    return float(np.sum(np.diff(recall_K, prepend=0.0) * precision_K))


def _ratio(part: Any, whole: Any) -> float:
    return float(part / whole) if whole else 0.0


def _conversation(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "text", "text": text}]}]


def _first_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Tokens with which `safe` and `unsafe` can begin, at the start of a line.

    Raises:
        UserError: both begin with the same token.
    """
    found = []
    for word in (SAFE, UNSAFE):
        after = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (word, f"\n\n{word}")]
        found.append({after[0][0], next(t for t in after[1] if tokenizer.decode([t]).strip())})
    if found[0] & found[1]:
        raise UserError(
            "safe and unsafe begin with the same token, so that no probability tells them apart",
            value=sorted(found[0] & found[1]),
            fix="use a tokenizer that knows these words",
        )
    return sorted(found[0]), sorted(found[1])


def _score(decoded: Decoded, tokenizer: Any, first_tokens: tuple[list[int], list[int]]) -> float:
    """P(unsafe) / (P(safe) + P(unsafe)) at the first token that is not blank; NaN where both are 0 or not numbers."""
    import torch

    texts = [tokenizer.decode([token], skip_special_tokens=True).strip() for token in decoded.ids]
    at = next((place for place, text in enumerate(texts) if text), 0)
    p_V = torch.softmax(decoded.logits_NV[at].double(), -1)
    safe, unsafe = (float(p_V[tokens].sum()) for tokens in first_tokens)
    return unsafe / (safe + unsafe) if safe + unsafe > 0 else math.nan


def _rows(dataset: Path, column: str) -> list[tuple[str, str, int]]:
    """(id, message, label) of the test split, in order."""
    import pyarrow.parquet as pq

    files = sorted(dataset.glob("test-*.parquet"))
    if not files:
        raise UserError("the dataset has no test split", where=str(dataset), fix="give its `split` a `test`")
    rows = []
    for path in files:
        table = pq.read_table(path)
        if column not in table.schema.names:
            raise UserError(
                "the dataset has no such column", where=str(dataset), value=column, allowed=table.schema.names,
                fix=f"keep it: give the dataset's source `columns: [{column}]`",
            )  # fmt: skip
        for row in table.to_pylist():
            label = str(row[column]).strip()
            if label not in ("0", "1", "True", "False"):
                raise UserError("a label is neither 0 nor 1", where=f"{dataset}: {row['id']}", value=label)
            rows.append((str(row["id"]), row["text"], int(label in ("1", "True"))))
    return rows


def _digest(prompts: list[list[int]]) -> str:
    return hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
