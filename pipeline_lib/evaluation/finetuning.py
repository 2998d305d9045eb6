"""Fine-tuning of an encoder on the data sets of a benchmark, one data set and seed after the other."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import get_cosine_schedule_with_warmup

from pipeline_lib.artifacts.progress import Progress
from pipeline_lib.config.errors import UserError
from pipeline_lib.evaluation.base import Outcome, Subject
from pipeline_lib.evaluation.benchmark import (
    DataSet,
    Examples,
    FineTuning,
    Rows,
    encode_rows,
    read_rows,
    score,
    steps_of,
    warmup_of,
)
from pipeline_lib.evaluation.statistics import Number, encode

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
INITIAL = 0.02
"""Standard deviation of the head's first weights."""


@dataclass(frozen=True)
class Work:
    """What one data set is fine-tuned on: examples by split, and its steps."""

    splits: dict[str, Examples]
    steps: int
    warmup: int


class FineTuned:
    """A benchmark with its examples read, ready to fine-tune many encoders."""

    def __init__(self, settings: FineTuning, folder: Path) -> None:
        self.settings = settings
        self._rows: dict[str, dict[str, Rows]] = {}
        for name, found in settings.chosen.items():
            splits = [split for split in ("train", found.validation, found.extra) if split]
            self._rows[name] = {split: read_rows(folder, name, found, split, settings.limit) for split in splits}
        first = next(iter(settings.SETS))
        if settings.warmup == "own" or first in self._rows:
            self._first = len(self._rows[first]["train"]) if first in self._rows else 0
        else:
            self._first = len(read_rows(folder, first, settings.SETS[first], "train", settings.limit))

    def run(self, subject: Subject, seed: int) -> Outcome:
        """Fine-tune and score one encoder; see `Task.run`. The seeds are the settings' own, `seed` moves nothing."""
        settings = self.settings
        span = int(subject.model.config.max_position_embeddings)
        if settings.seq_len > span:
            raise UserError(
                "inputs are longer than the model's positions",
                where=f"task {getattr(settings, 'type', '')}: seq_len",
                value=settings.seq_len,
                allowed=f"up to {span}",
                fix="lower seq_len",
            )
        works = {name: self._work(name, subject) for name in settings.chosen}
        scores: dict[str, list[float]] = {}
        record: dict[str, Any] = {}
        with Progress("fine-tune", len(works) * len(settings.seeds), "runs") as progress:
            for own in settings.seeds:
                for name, work in works.items():
                    make = partial(fine_tune, subject, settings, name, work, own)
                    found = subject.once(f"{name}-{own}", make)
                    record[f"{name}-{own}"] = found
                    for metric, value in found["scores"].items():
                        scores.setdefault(metric, []).append(value)
                    progress.update()
        averaged = sorted(scores)
        scores["average"] = [sum(values) / len(values) for values in zip(*scores.values(), strict=True)]
        return Outcome(
            metrics={name: sum(values) / len(values) for name, values in scores.items()},
            sampling_stderr={},
            n_samples=sum(len(work.splits[settings.SETS[name].validation].ids) for name, work in works.items()),
            conditions={
                "average_of": averaged,
                "higher_is_better": {"": dict.fromkeys(scores, True)},
                "steps": {name: work.steps for name, work in works.items()},
                "warmup_steps": {name: work.warmup for name, work in works.items()},
                "examples": {name: {s: e.digest() for s, e in work.splits.items()} for name, work in works.items()},
            },
            record={"runs": record},
            repeats=scores,
        )

    def _work(self, name: str, subject: Subject) -> Work:
        splits = {
            split: encode_rows(rows, subject.tokenizer, self.settings) for split, rows in self._rows[name].items()
        }
        steps = steps_of(len(splits["train"].ids), self.settings)
        first = steps_of(self._first, self.settings)
        return Work(splits, steps, warmup_of(steps, first, self.settings))


class Classifier(nn.Module):
    """An encoder, and a head on the first token: Linear, Tanh, dropout, Linear."""

    def __init__(self, encoder: nn.Module, width: int, head_width: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Sequential(
            nn.Linear(width, head_width), nn.Tanh(), nn.Dropout(dropout), nn.Linear(head_width, classes)
        )
        for layer in (self.head[0], self.head[3]):
            nn.init.normal_(layer.weight, std=INITIAL)  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, tokens_BT: Tensor, mask_BT: Tensor | None) -> Tensor:
        """Outputs [B, classes] for tokens [B, T] and a mask that is 0 on padding."""
        hidden_BTD = self.encoder(input_ids=tokens_BT, attention_mask=mask_BT).last_hidden_state
        return self.head(hidden_BTD[:, 0])


def fine_tune(subject: Subject, settings: FineTuning, name: str, work: Work, seed: int) -> dict[str, Any]:
    """Fine-tune a copy of the encoder on one data set.

    The subject is left as it is, and so are torch's generators. Under a transform the copy is trained and scored with
    it: each optimizer step draws its own faults.

    Returns:
        {scores: {metric: value}, epochs: validation scores of the epochs that were scored, losses: mean training
        loss of each epoch, steps, warmup_steps, last_lr_factor}; plain JSON.
    """
    data_set, at = settings.SETS[name], int.from_bytes(hashlib.sha256(f"{name}/{seed}".encode()).digest()[:7], "big")
    with torch.random.fork_rng():
        torch.manual_seed(at)
        run = _Run(subject, settings, data_set, work, at)
        run.train()
    metric = f"{name}_{data_set.score}"
    chosen = max if settings.epoch == "published" else lambda values: values[-1]
    scores = {metric: chosen(run.epochs)}
    if data_set.extra:
        scores[f"{metric}_extra"] = run.score(data_set.extra)
    return {
        "scores": scores,
        "epochs": run.epochs,
        "losses": run.losses,
        "steps": work.steps,
        "warmup_steps": work.warmup,
        "last_lr_factor": run.last_factor,
    }


class _Run:
    """One fine-tuning."""

    def __init__(self, subject: Subject, settings: FineTuning, data_set: DataSet, work: Work, seed: int) -> None:
        self.settings, self.data_set, self.work, self.context = settings, data_set, work, subject.context
        # The faults' bookkeeping is shared with the layers that ask it, not copied.
        memo: dict[int, Any] = {} if subject.context is None else {id(subject.context): subject.context}
        masked: Any = copy.deepcopy(subject.model, memo)
        encoder = masked.base_model
        for module in encoder.modules():
            if isinstance(module, nn.Dropout):
                module.p = settings.dropout
        self.device = next(encoder.parameters()).device
        model = Classifier(
            encoder.float(), masked.config.hidden_size, settings.head_width, data_set.classes, settings.dropout
        )
        self.model = model.to(self.device)
        self.pad = 0 if subject.tokenizer.pad_token_id is None else int(subject.tokenizer.pad_token_id)  # type: ignore[arg-type]
        self.order = torch.Generator().manual_seed(seed)
        self.step, self.last_factor = 0, 0.0
        self.epochs: list[float] = []
        self.losses: list[Number] = []

    def train(self) -> None:
        """All epochs."""
        settings, examples = self.settings, self.work.splits["train"]
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(
            trained, lr=settings.lr, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay
        )
        schedule = get_cosine_schedule_with_warmup(optimizer, self.work.warmup, self.work.steps)
        scale = torch.amp.GradScaler(self.device.type, enabled=settings.precision == "fp16")
        per_epoch = self.work.steps // settings.epochs
        for epoch in range(settings.epochs):
            self.model.train()
            count = len(examples.ids)
            order = torch.randperm(count, generator=self.order).tolist() if settings.shuffle else list(range(count))
            summed = 0.0
            for batch in range(per_epoch):
                chosen = order[batch * settings.batch : (batch + 1) * settings.batch]
                loss = self._loss(examples, chosen)
                optimizer.zero_grad(set_to_none=True)
                scale.scale(loss).backward()
                scale.step(optimizer)
                scale.update()
                self.step += 1
                schedule.step()
                summed += float(loss.detach())
            self.losses.append(encode(summed / per_epoch))
            if settings.epoch == "published" or epoch == settings.epochs - 1:
                self.epochs.append(self.score(self.data_set.validation))
        self.last_factor = schedule.get_last_lr()[0] / settings.lr

    def _loss(self, examples: Examples, chosen: list[int]) -> Tensor:
        output_BC = self._forward(examples, chosen, self.step, self.step * self.settings.batch).float()
        label_B = torch.tensor([examples.labels[at] for at in chosen], device=self.device)
        if self.data_set.classes == 1:
            return F.mse_loss(output_BC[:, 0], label_B)
        return F.cross_entropy(output_BC, label_B.long())

    def _forward(self, examples: Examples, chosen: list[int], step: int, first: int) -> Tensor:
        width = max(len(examples.ids[at]) for at in chosen)
        tokens_BT = torch.full((len(chosen), width), self.pad)
        mask_BT = torch.zeros_like(tokens_BT)
        for row, at in enumerate(chosen):
            ids = examples.ids[at]
            tokens_BT[row, : len(ids)] = torch.tensor(ids)
            mask_BT[row, : len(ids)] = 1
        mask = mask_BT.to(self.device) if self.settings.padding == "masked" else None
        if self.context is not None:
            self.context.begin(step, first)
        dtype = DTYPES[self.settings.precision]
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32):
            return self.model(tokens_BT.to(self.device), mask)

    @torch.no_grad()
    def score(self, split: str) -> float:
        """The data set's metric on a split; its batches are the training's, so no setting of a machine changes it."""
        self.model.eval()
        examples = self.work.splits[split]
        outputs = []
        for first in range(0, len(examples.ids), self.settings.batch):
            chosen = list(range(first, min(first + self.settings.batch, len(examples.ids))))
            outputs.append(self._forward(examples, chosen, self.step, first).float().cpu().numpy())
        return score(self.data_set.metric, np.concatenate(outputs), examples.labels)
