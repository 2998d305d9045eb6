"""Greedy decoding, alike for every model that is compared, with or without prompt lookup. Imports no torch at its top.

Prompt lookup (Saxena, 2023) proposes the tokens that followed the last ones where they stood before; the model checks
all of them in one forward pass and keeps those that it would have chosen itself. So it changes the speed and, but for
rounding, no token.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic import Field

from pipeline_lib.config.base import Settings

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline_lib.evaluation.base import Subject


class Decoding(Settings):
    """How answers are generated: always greedily, whatever the model's own settings say."""

    max_new_tokens: int = Field(1280, ge=1, description="longest answer, tokens; fewer where the context ends")
    prompt_lookup: int = Field(
        0, ge=0, le=64, description="tokens proposed at a time by looking the last ones up in the prompt; 0: none"
    )
    lookup_ngram: int = Field(2, ge=1, description="prompt lookup: longest run of last tokens that is looked up")

    def generation(self) -> dict[str, Any]:
        """The same as arguments of transformers' `generate`."""
        lookup = {"prompt_lookup_num_tokens": self.prompt_lookup, "max_matching_ngram_size": self.lookup_ngram}
        return {"do_sample": False, **(lookup if self.prompt_lookup else {})}


@dataclass(frozen=True)
class Decoded:
    """A generated answer.

    Attributes:
        ids: token ids, the end token included.
        passes: forward passes after the prompt's.
        prefill_s, decode_s: wall time up to the end of the prompt's forward pass, and from there on.
        logits_NV: for each new token the logits it was chosen from, where asked for.
    """

    ids: list[int]
    passes: int
    prefill_s: float
    decode_s: float
    logits_NV: Sequence[Tensor] = field(default=(), repr=False)

    @property
    def per_pass(self) -> float:
        """Tokens for each forward pass after the prompt's: the acceptance length; 1 without lookup."""
        return (len(self.ids) - 1) / self.passes if self.passes else 1.0


def greedy(
    subject: Subject,
    prompt_ids: list[int],
    decoding: Decoding,
    sequence: int,
    ends: Sequence[int] = (),
    logits: bool = False,
) -> Decoded:
    """Generate from one prompt.

    Args:
        subject: the model; its own sampling settings take no part.
        prompt_ids: token ids, special tokens included.
        decoding: lengths and lookup.
        sequence: number of the sequence in the evaluation, for the fault streams.
        ends: tokens that end an answer; with none it is as long as allowed.
        logits: keep them.

    Raises:
        ValueError: the prompt leaves no room in the model's context.
    """
    import torch
    from transformers import GenerationConfig

    model: Any = subject.model
    room = min(decoding.max_new_tokens, model.config.max_position_embeddings - len(prompt_ids))
    if room < 1:
        raise ValueError(f"a prompt of {len(prompt_ids)} tokens fills the model's context")
    if subject.context is not None:
        subject.context.begin(0, sequence)
    ids_1T = torch.tensor([prompt_ids], device=model.device)
    config = GenerationConfig(
        max_new_tokens=room, eos_token_id=list(ends) or None, pad_token_id=ends[0] if ends else 0,
        return_dict_in_generate=True, output_logits=logits, **decoding.generation(),
    )  # fmt: skip
    with torch.no_grad(), _own_settings_aside(model), _clock(model) as ticks:
        start = _now(model)
        out = model.generate(ids_1T, attention_mask=torch.ones_like(ids_1T), generation_config=config)
        end = _now(model)
    ids = out.sequences[0, len(prompt_ids) :].tolist()
    kept = [logits_1V[0] for logits_1V in out.logits][: len(ids)] if logits else ()
    return Decoded(ids, len(ticks) - 1, ticks[0] - start, end - ticks[0], kept)


@contextmanager
def _own_settings_aside(model: Any) -> Iterator[None]:
    """transformers fills in what a call leaves open from the model's own settings: sampling, penalties."""
    from transformers import GenerationConfig

    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


@contextmanager
def _clock(model: Any) -> Iterator[list[float]]:
    """The time at the end of each forward pass."""
    ticks: list[float] = []
    handle = model.register_forward_hook(lambda *_: ticks.append(_now(model)))
    try:
        yield ticks
    finally:
        handle.remove()


def _now(model: Any) -> float:
    import torch

    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()
