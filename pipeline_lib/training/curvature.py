"""The Gauss-Newton-Bartlett estimate behind Sophia-G: gradients of a loss whose labels the model itself has sampled.

Liu et al., 2023, arXiv 2305.14342, algorithm 2. For labels ŷ from the model's own distribution, and ĝ the gradient of
the mean cross entropy over B of them, B·ĝ² is an unbiased estimate of the Gauss-Newton matrix's diagonal.
"""

from __future__ import annotations

import hashlib
import math
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from pipeline_lib.config.errors import UserError
from pipeline_lib.models.blocks import only
from pipeline_lib.training import distributed
from pipeline_lib.training.batching import micro_seed
from pipeline_lib.training.build import autocast
from pipeline_lib.training.hooks import Batch
from pipeline_lib.training.losses import IGNORED
from pipeline_lib.training.masking import logits_at

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipeline_lib.training.cram import CramHooks
    from pipeline_lib.training.loop import Loop

PUBLISHED_SEQUENCES = 128
"""NoTrainNoGain forgets the gradient before each micro-batch of 128, so that only the last one counts."""


class Curvature:
    """Estimates for the loop's optimizer, which must have `update_hessian`.

    Args:
        how: "logits", or "published" for the estimate as it was published, faults included.
        sequences: of each estimate.

    Raises:
        UserError: the ranks cannot share the sequences evenly.
    """

    def __init__(self, cram: CramHooks, loop: Loop, how: str, sequences: int) -> None:
        self.cram, self.loop, self.published = cram, loop, how == "published"
        self.sequences = min(sequences, PUBLISHED_SEQUENCES) if self.published else sequences
        if self.sequences % distributed.world():
            raise UserError(
                "the sequences of a Hessian estimate are not a multiple of the ranks",
                where="recipe.cram.methods.sophia-g.hessian_sequences",
                value=self.sequences,
                allowed=f"multiples of {distributed.world()}",
                fix="change it, or the number of processes",
            )

    def estimate(self, text: Batch, step: int) -> bool:
        """Make an estimate from fresh text (alike on every rank) and hand it to the optimizer.

        Returns:
            False where the gradient overflowed, and nothing was handed over.
        """
        text = {name: tensor[-self.sequences :] for name, tensor in text.items()}
        optimizer: Any = self.loop.optimizer
        optimizer.zero_grad(set_to_none=True)
        count = text["labels"].numel() if self.published else int((text["labels"] != IGNORED).sum())
        scale = 1.0 if self.published else self.loop.scale.value  # published: not scaled, in fp16 neither
        for first, batch in self.cram.shares(text):
            loss = self._sampled_loss(batch, step, first) / max(count, 1)
            (loss * scale).backward()
        good = self._unscale(scale)
        if good:
            optimizer.update_hessian()
        optimizer.zero_grad(set_to_none=True)
        return good

    def _sampled_loss(self, batch: Batch, step: int, first: int) -> Tensor:
        """Summed cross entropy of labels that are sampled from the model's own distribution."""
        loop, settings = self.loop, self.cram.settings
        torch.manual_seed(micro_seed(self.cram.seed, step, first))
        loop.context.begin(step, first % settings.global_batch)
        with autocast(loop.device, settings.precision), only(loop.model, self.cram.active(step)):
            if self.published:
                logits_NV, at_BT = self._hidden(batch).flatten(0, 1), torch.ones_like(batch["labels"], dtype=torch.bool)
            else:
                at_BT = batch["labels"] != IGNORED
                logits_NV = logits_at(loop.model, batch["input_ids"], at_BT, self.cram.encoder)
        logits_NV = logits_NV.float()
        uniform_BT = torch.stack([uniforms(self.cram.seed, int(p), at_BT.shape[1]) for p in batch["place"]])
        labels_N = sampled(logits_NV.detach(), uniform_BT.to(at_BT.device)[at_BT])
        return F.cross_entropy(logits_NV, labels_N, reduction="sum")

    def _hidden(self, batch: Batch) -> Tensor:
        """What the model's body gives to its head; the whole model runs, so that sharded parameters are gathered."""
        with _outputs(self.loop.model.base_model) as kept:
            logits_at(self.loop.model, batch["input_ids"], batch["labels"] != IGNORED, self.cram.encoder)
        return kept[0].last_hidden_state

    @torch.no_grad()
    def _unscale(self, scale: float) -> bool:
        """Divide the gradients by the loss's scale; whether all of them, on all ranks, are finite."""
        gradients = [p.grad for p in self.loop.model.parameters() if p.grad is not None]
        if scale != 1.0:
            for gradient in gradients:
                gradient.div_(scale)
        norm = torch.nn.utils.get_total_norm(gradients)
        return math.isfinite(float(norm.full_tensor() if isinstance(norm, DTensor) else norm))


@contextmanager
def _outputs(module: torch.nn.Module) -> Iterator[list[Any]]:
    """Inside, every output of the module is kept."""
    kept: list[Any] = []
    handle = module.register_forward_hook(lambda module, arguments, output: kept.append(output))
    try:
        yield kept
    finally:
        handle.remove()


def uniforms(seed: int, place: int, count: int) -> Tensor:
    """The uniform numbers of the sequence at a place of the text read; float32 [count] in [0, 1)."""
    digest = hashlib.sha256(f"hessian/{seed}/{place}".encode()).digest()
    return torch.rand(count, generator=torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1))


def sampled(logits_NV: Tensor, uniform_N: Tensor) -> Tensor:
    """A class for each row, where the cumulative distribution reaches the row's uniform number; int64 [N]."""
    mass_NV = torch.softmax(logits_NV, dim=-1).cumsum(dim=-1)
    wanted_N1 = uniform_N[:, None] * mass_NV[:, -1:]
    return torch.searchsorted(mass_NV, wanted_N1, right=True)[:, 0].clamp_(max=logits_NV.shape[-1] - 1)
