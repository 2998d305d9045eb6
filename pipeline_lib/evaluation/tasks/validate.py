"""Loss on held-out text, as a training computes it: of masked tokens for an encoder, of next tokens for a decoder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from pipeline_lib.config.base import Settings as Base
from pipeline_lib.config.errors import UserError
from pipeline_lib.evaluation.base import Outcome, Subject

if TYPE_CHECKING:
    from torch import Tensor

MICRO_BATCH = 128
"""Sequences of a published micro-batch."""
TAKES_DATASET = True
"""Without a dataset of the task's, the experiment's is evaluated on."""


class Settings(Base):
    """The text, and the masks, which are alike for every model with the same tokenizer."""

    type: Literal["validate"] = "validate"
    dataset: str | None = Field(None, description="one of our datasets; null: the experiment's own")
    split: Literal["valid", "test"] = Field("valid", description="split of the dataset")
    sequences: int | None = Field(None, ge=2, description="windows of text; null = the whole split")
    seq_len: int = Field(128, ge=2, description="tokens of a window")
    mask_rate: float = Field(0.15, gt=0, lt=1, description="share of tokens an encoder has to predict")
    mask_seed: int = Field(0, ge=0, description="seed of the masks")
    average: Literal["targets", "published"] = Field(
        "targets",
        description="targets: every target counts alike; published: every micro-batch of 128 windows does, however "
        "many targets it has, and the last one however few windows",
    )


def needs(settings: Settings) -> list[dict[str, Any]]:
    """No hub files."""
    return []


def refuses(settings: Settings, model_family: str) -> str | None:
    """Nothing: every language model has a loss."""
    return None


def open_task(settings: Mapping[str, Any], inputs: Mapping[str, Path], scratch: Path) -> Validation:
    """The task with its text."""
    return Validation(Settings.model_validate(settings), inputs["dataset"])


class Validation:
    """Held-out text, ready for many models."""

    def __init__(self, settings: Settings, dataset: Path) -> None:
        self.settings, self._dataset = settings, dataset

    def run(self, subject: Subject, seed: int) -> Outcome:
        """Score one model; see `Task.run`. `seed` moves nothing: the masks have a seed of their own."""
        import torch

        from pipeline_lib.artifacts.progress import Progress
        from pipeline_lib.evaluation.ranges import digest

        input_BT, label_BT = self._examples(subject)
        figures = []  # of each window: summed loss, targets, right ones
        with Progress("validate", len(input_BT), "sequences") as progress, torch.no_grad():
            for first in range(0, len(input_BT), subject.batch_size):
                part = slice(first, first + subject.batch_size)
                if subject.context is not None:
                    subject.context.begin(0, first)
                logits_BTV = subject.model(input_ids=input_BT[part].to(subject.model.device)).logits
                figures.append(_figures(logits_BTV, label_BT[part].to(logits_BTV.device)).cpu())
                progress.update(len(input_BT[part]))
        loss_B, target_B, right_B = torch.cat(figures).double().unbind(1)
        loss = float(loss_B.sum() / target_B.sum())
        errors = {"loss": _ratio_error(loss_B, target_B)}
        if self.settings.average == "published":
            parts = zip(loss_B.split(MICRO_BATCH), target_B.split(MICRO_BATCH), strict=True)
            means = [float(losses.sum() / targets.sum()) for losses, targets in parts]
            loss, errors = sum(means) / len(means), {}
        return Outcome(
            metrics={
                "loss": loss,
                "perplexity": math.exp(min(loss, 700.0)) if math.isfinite(loss) else loss,
                "accuracy": float(right_B.sum() / target_B.sum()),
            },
            sampling_stderr={name: error for name, error in errors.items() if math.isfinite(error)},
            n_samples=len(input_BT),
            conditions={
                "text": digest(input_BT),
                "labels": digest(label_BT),
                "targets": int(target_B.sum()),
                "higher_is_better": {"": {"loss": False, "perplexity": False, "accuracy": True}},
            },
        )

    def _examples(self, subject: Subject) -> tuple[Tensor, Tensor]:
        """Inputs and labels [sequences, T]: hidden tokens and what they are, or text and what follows it."""
        import torch

        from pipeline_lib.data.masking import hide_tokens, mask_seed, special_tokens_of
        from pipeline_lib.evaluation.ranges import windows

        settings = self.settings
        span = int(subject.model.config.max_position_embeddings)
        if settings.seq_len > span:
            raise UserError(
                "windows are longer than the model's positions",
                where="task validate: seq_len",
                value=settings.seq_len,
                allowed=f"up to {span}",
                fix="lower seq_len",
            )
        masked = type(subject.model).__name__.endswith("ForMaskedLM")
        length = settings.seq_len + (not masked)
        text_BT = windows(self._texts, subject.tokenizer, settings.sequences, length)
        if not masked:
            return text_BT[:, :-1], text_BT[:, 1:]
        mask, special = special_tokens_of(subject.tokenizer, "task validate: the model's tokenizer")
        vocab, rows = int(subject.model.config.vocab_size), []  # type: ignore[arg-type]
        for place, text_T in enumerate(text_BT):
            generator = torch.Generator().manual_seed(mask_seed(settings.mask_seed, 0, place))
            hidden = torch.isin(text_T, special)
            rows.append(hide_tokens(text_T, hidden, mask, vocab, settings.mask_rate, generator))
        return torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])

    def _texts(self) -> Any:
        import pyarrow.parquet as pq

        for path in sorted(self._dataset.glob(f"{self.settings.split}-*.parquet")):
            for batch in pq.ParquetFile(path).iter_batches(256, columns=["text"]):
                yield from batch.column("text").to_pylist()


def _figures(logits_BTV: Tensor, label_BT: Tensor) -> Tensor:
    """[B, 3]: nats summed over the targets of a sequence, their number, and how many the model puts first."""
    import torch
    from torch.nn import functional as F

    from pipeline_lib.data.masking import IGNORED

    logits = logits_BTV.float()
    loss_BT = F.cross_entropy(logits.transpose(1, 2), label_BT, ignore_index=IGNORED, reduction="none")
    is_target_BT = label_BT != IGNORED
    right_BT = (logits.argmax(-1) == label_BT) & is_target_BT
    return torch.stack([loss_BT.sum(1), is_target_BT.sum(1).float(), right_BT.sum(1).float()], 1)


def _ratio_error(loss_B: Tensor, target_B: Tensor) -> float:
    """Standard error of Σ loss / Σ targets over sequences (Cochran, Sampling Techniques, 1977, §6.3)."""
    n, mean = len(loss_B), loss_B.sum() / target_B.sum()
    return float(((loss_B - mean * target_B).square().sum() * n / (n - 1)).sqrt() / target_B.sum())
