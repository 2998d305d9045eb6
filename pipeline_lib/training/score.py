"""Stage `score`: the loss of every training sequence under a model that was not trained on them.

Irreducible losses (Mindermann et al., 2022, arXiv 2206.07137, equation 3). A sequence's masks are a function of its
number, so neither batches nor a resume change them, and a training can show a sequence with the very same masks.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from pipeline_lib.artifacts.files import sync
from pipeline_lib.artifacts.job import Job
from pipeline_lib.artifacts.progress import Progress, say
from pipeline_lib.config.errors import UserError
from pipeline_lib.data.example_losses import ExampleLosses, check_same, sequence_count, sequences_digest
from pipeline_lib.data.tokens import TokenShards
from pipeline_lib.models.checkpoint import checkpoint_directory, load_model
from pipeline_lib.training.hooks import Batch
from pipeline_lib.training.losses import IGNORED, cross_entropy_per_example
from pipeline_lib.training.masking import hide_tokens, masked_loss, special_tokens
from pipeline_lib.training.settings import option

PART = 2**13
"""Sequences that are scored between two writes."""


def build(job: Job) -> None:
    """Leave losses.safetensors and score.json.

    Settings: seq_len, and of an encoder masks {seed, rate}; or nothing but seq_len where losses are imported.
    Inputs: tokens, and model and tokenizer; or imported. Resumed part by part.

    Raises:
        UserError: the model has too few positions; imported losses are of other sequences.
    """
    shards, seq_len = TokenShards(job.inputs["tokens"], "train"), job.settings["seq_len"]
    if "imported" in job.inputs:
        _adopt(job, shards, seq_len)
        return
    losses = _measure(job, shards, seq_len)
    digest = sequences_digest(shards, seq_len)
    ExampleLosses(losses, seq_len, digest, job.settings["masks"]).save(job.out)
    say(f"{len(losses)} sequences, mean loss {np.nanmean(losses.astype(np.float64)):.4f} nats a target")


def _adopt(job: Job, shards: TokenShards, seq_len: int) -> None:
    losses = ExampleLosses.load(job.inputs["imported"] / "files")
    if losses.seq_len != seq_len:
        raise UserError(
            "the losses are of sequences of another length",
            where=job.label,
            value=losses.seq_len,
            allowed=str(seq_len),
            fix="train with their seq_len",
        )
    check_same(losses, shards, f"{job.label}: losses")
    losses.save(job.out)


def _measure(job: Job, shards: TokenShards, seq_len: int) -> np.ndarray:
    if job.execution.get("threads"):
        torch.set_num_threads(int(job.execution["threads"]))
    batch_size, total = int(option(job, "eval_batch_size", 8)), sequence_count(shards, seq_len)
    if total < 1:
        raise UserError("no sequence to score", where=str(shards.artifact), value=shards.n_tokens, fix="lower seq_len")
    scorer = Scorer(job, shards, seq_len)
    folder = job.work / f"parts-of-{batch_size}"
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    with Progress("score", total, "sequences") as progress:
        for first in range(0, total, PART):
            path, count = folder / f"{first // PART:06d}.safetensors", min(PART, total - first)
            if not path.exists():
                _write(path, scorer.losses(first, count, batch_size))
            found.append(load_file(path)["loss"])
            progress.update(count)
    return np.concatenate(found)


def _write(path: Path, loss_N: np.ndarray) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    save_file({"loss": loss_N}, temporary)
    sync(temporary)
    temporary.replace(path)
    sync(path.parent)


class Scorer:
    """A model, and the sequences that it is asked about."""

    def __init__(self, job: Job, shards: TokenShards, seq_len: int) -> None:
        self.shards, self.seq_len = shards, seq_len
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model: Any = load_model(checkpoint_directory(job.inputs["model"]), job.settings["dtype"]).to(self.device)  # type: ignore[arg-type]
        span = self.model.config.max_position_embeddings
        if seq_len > span:
            raise UserError(
                "sequences are longer than the model that scores them has positions",
                where=f"{job.label}: seq_len",
                value=seq_len,
                allowed=f"at most {span}",
                fix="train it with the seq_len of the experiment that uses its losses",
            )
        self.masks = None
        if job.settings["masks"] is not None:
            mask, special = special_tokens(job)
            self.masks = Masks(**job.settings["masks"], token=mask, special=special, vocab=self.model.config.vocab_size)

    @torch.no_grad()
    def losses(self, first: int, count: int, batch_size: int) -> np.ndarray:
        """Mean loss of each of `count` sequences from `first` on; float32 [count]."""
        found = []
        for start in range(first, first + count, batch_size):
            numbers = range(start, min(start + batch_size, first + count))
            batch = {name: tensor.to(self.device) for name, tensor in self._batch(numbers).items()}
            if self.masks:
                loss_B = masked_loss(self.model, batch)
            else:
                logits_BTV = self.model(input_ids=batch["input_ids"], use_cache=False).logits
                loss_B = cross_entropy_per_example(logits_BTV, batch["labels"])
            found.append(mean_losses(loss_B, batch["labels"]).cpu())
        return torch.cat(found).numpy()

    def _batch(self, numbers: range) -> Batch:
        windows = np.stack([self.shards.read(k * self.seq_len, self.seq_len + 1) for k in numbers])
        window_BT = torch.from_numpy(windows.astype(np.int64))
        if self.masks is None:
            return {"input_ids": window_BT[:, :-1], "labels": window_BT[:, 1:]}
        return self.masks.batch(window_BT[:, :-1], list(numbers))


class Masks:
    """The masks with which sequences are scored: a function of the sequence's number, whatever the batch.

    Args:
        seed, rate: as in score.json.
        token: id of the mask token.
        special: ids of tokens that are never hidden.
        vocab: random tokens are below it.
    """

    def __init__(self, seed: int, rate: float, token: int, special: torch.Tensor, vocab: int) -> None:
        self.seed, self.rate, self.token, self.special, self.vocab = seed, rate, token, special, vocab

    def batch(self, text_BT: torch.Tensor, numbers: list[int]) -> Batch:
        """input_ids and labels [B, T] of the sequences with these numbers."""
        rows = []
        for text_T, number in zip(text_BT, numbers, strict=True):
            digest = hashlib.sha256(f"score/{self.seed}/{number}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            special_T = torch.isin(text_T, self.special)
            rows.append(hide_tokens(text_T, special_T, self.token, self.vocab, self.rate, generator))
        return {"input_ids": torch.stack([row[0] for row in rows]), "labels": torch.stack([row[1] for row in rows])}


def mean_losses(loss_B: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """From the sum over each sequence's targets to their mean; fp32 [B], NaN where there is no target."""
    return loss_B / (labels_BT != IGNORED).sum(dim=1)
