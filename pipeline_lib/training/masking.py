"""Masked language modelling: which tokens are hidden is a function of the place in the training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pipeline_lib.data.masking import hide_tokens, mask_seed, special_tokens_of
from pipeline_lib.data.tokens import TokenShards
from pipeline_lib.models.checkpoint import load_tokenizer
from pipeline_lib.training.hooks import Batch, Hooks
from pipeline_lib.training.losses import IGNORED, cross_entropy_per_example

if TYPE_CHECKING:
    from pipeline_lib.artifacts.job import Job
    from pipeline_lib.data.tokens import BatchLoader
    from pipeline_lib.training.loop import Loop


class TextHooks(Hooks):
    """Next-token loss for a decoder, masked-token loss for an encoder.

    Attributes:
        encoder: whether the model is a masked language model.
    """

    def __init__(self, settings: Any, job: Job) -> None:
        super().__init__(settings, job.settings["seed"])
        self.settings: Any = settings
        self._job = job
        self.encoder = False

    def prepare(self, loop: Loop) -> None:
        """Set dropout; learn what kind of model it is and, for an encoder, which token hides the others."""
        for module in loop.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = self.settings.dropout
        self.encoder = type(loop.model).__name__.endswith("ForMaskedLM")
        if self.encoder:
            self._vocab: int = loop.model.config.vocab_size
            self._mask, self._special = special_tokens(self._job)

    def batch(self, loader: BatchLoader, step: int, first: int, count: int) -> Batch:
        """The text as it is, or with tokens hidden and only these as labels."""
        batch = super().batch(loader, step, first, count)
        if not self.encoder:
            return batch
        return self._hidden(batch["input_ids"], [mask_seed(self.seed, step, first + row) for row in range(count)])

    def _held_out(self, count: int) -> Batch:
        """The first `count` sequences of the validation split, or all; masked alike in every training."""
        shards = TokenShards(self._job.inputs["tokens"], "valid")
        length = self.settings.seq_len
        count = min(count, (shards.n_tokens - 1) // length)
        windows = [torch.from_numpy(shards.read(k * length, length + 1).astype("int64")) for k in range(count)]
        text_BT = torch.stack([window_T[:-1] for window_T in windows])
        if not self.encoder:
            return {"input_ids": text_BT, "labels": torch.stack([window_T[1:] for window_T in windows])}
        return self._hidden(text_BT, [mask_seed(0, -1, k) for k in range(count)])

    def _hidden(self, text_BT: Tensor, seeds: list[int]) -> Batch:
        rows = [self._hide(text_T, seed) for text_T, seed in zip(text_BT, seeds, strict=True)]
        return {"input_ids": torch.stack([row[0] for row in rows]), "labels": torch.stack([row[1] for row in rows])}

    def _hide(self, text_T: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        special_T = torch.isin(text_T, self._special)
        return hide_tokens(text_T, special_T, self._mask, self._vocab, self.settings.mask_rate, generator)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross entropy of each sequence's targets."""
        if not self.encoder:
            return super().loss(model, batch)
        return masked_loss(model, batch)


def masked_loss(model: nn.Module, batch: Batch) -> Tensor:
    """loss_B of an encoder: fp32, summed over each sequence's targets."""
    if not hasattr(model, "masked_logits"):
        return cross_entropy_per_example(model(input_ids=batch["input_ids"]).logits, batch["labels"])
    labels_BT = batch["labels"]
    at_BT = labels_BT != IGNORED
    loss_N = cross_entropy_per_example(logits_at(model, batch["input_ids"], at_BT)[:, None], labels_BT[at_BT][:, None])
    return loss_N.new_zeros(len(labels_BT)).index_add(0, at_BT.nonzero()[:, 0], loss_N)


def logits_at(model: nn.Module, input_BT: Tensor, at_BT: Tensor, encoder: bool = True) -> Tensor:
    """logits_NV at the chosen positions, one after another; a model that can decodes no others."""
    if hasattr(model, "masked_logits"):
        return model(input_ids=input_BT, at=at_BT).logits
    more = {} if encoder else {"use_cache": False}
    return model(input_ids=input_BT, **more).logits[at_BT]


def special_tokens(job: Job) -> tuple[int, Tensor]:
    """(id of the token that hides others, ids of all special tokens) of the job's tokenizer."""
    return special_tokens_of(load_tokenizer(job.inputs["tokenizer"]), f"{job.label}: tokenizer")
