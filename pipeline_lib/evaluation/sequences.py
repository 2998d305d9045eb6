"""lm-eval's Hugging Face model, with every sequence it runs counted for the fault streams."""

from __future__ import annotations

import sys
from itertools import pairwise
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor, nn

from pipeline_lib.evaluation.base import Subject

Base: Any = HFLM  # lm-eval's registering decorator hides the type


class SequenceLM(Base):
    """HFLM that tells the fault context which sequences a forward pass holds.

    Sequences are numbered from 0 over the whole evaluation in the order in which HFLM runs them. That order
    must not depend on the batch size: HFLM sorts all requests by length, but those of rolling tasks only
    within a batch, so here these too are sorted as a whole; and generation runs prompts of one length
    together, since padding on the left would shift positions within the fault streams.
    """

    def __init__(self, subject: Subject, max_length: int | None) -> None:
        super().__init__(
            pretrained=subject.model,
            tokenizer=subject.tokenizer,
            batch_size=subject.batch_size,
            max_length=max_length,
        )
        self._context = subject.context
        self._sequences = 0
        self._in_one_batch = False
        self._quiet = not sys.stderr.isatty()

    @property
    def batch_size(self) -> Any:
        """Sequences a forward pass; without limit while windows are collected, so that they are sorted as a whole."""
        return sys.maxsize if self._in_one_batch else super().batch_size

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm or self._quiet)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        self._in_one_batch = True
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm or self._quiet)
        finally:
            self._in_one_batch = False

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        return super().generate_until(requests, disable_tqdm=disable_tqdm or self._quiet)

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        self._in_one_batch = False
        return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm or self._quiet)

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        self._take(len(inps))
        return super()._model_call(inps, attn_mask, labels)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any) -> Tensor:
        alone = bool(
            generation_kwargs.get("prompt_lookup_num_tokens")
        )  # transformers looks up for one prompt at a time
        if self._context is None and not alone:
            return super()._model_generate(context, max_length, stop, **generation_kwargs)
        mask_BT = generation_kwargs.pop("attention_mask")
        copies = generation_kwargs.get("num_beams") or 1
        padding_B = (mask_BT == 0).sum(dim=1).tolist()
        outputs = []
        for first, last in [(i, i + 1) for i in range(len(padding_B))] if alone else _runs(padding_B):
            padding = padding_B[first]
            self._take((last - first) * copies)
            out_BT = super()._model_generate(
                context[first:last, padding:],
                max_length - padding,
                stop,
                attention_mask=mask_BT[first:last, padding:],
                **generation_kwargs,
            )
            outputs.append(torch.cat([context[first:last, :padding], out_BT], dim=1))
        width = max(out_BT.shape[1] for out_BT in outputs)
        pad = self.tokenizer.pad_token_id
        return torch.cat([nn.functional.pad(out, (0, width - out.shape[1]), value=pad) for out in outputs])

    def get_model_info(self) -> dict[str, Any]:
        """Size and dtype; lm-eval's own also asks the hub for the commit of a model that lies in memory."""
        return {"model_num_parameters": self.model.num_parameters(), "model_dtype": str(self.model.dtype)}

    def _take(self, count: int) -> None:
        """Announce the next `count` sequences; within generation the context follows the KV cache by itself."""
        if self._context is not None:
            self._context.begin(0, self._sequences)
        self._sequences += count


def _runs(values: list[int]) -> list[tuple[int, int]]:
    """[first, last) of each run of equal neighbours."""
    edges = [0, *(i for i in range(1, len(values)) if values[i] != values[i - 1]), len(values)]
    return list(pairwise(edges))
