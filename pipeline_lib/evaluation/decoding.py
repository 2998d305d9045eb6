"""Continuation of prompts token by token, with randomness and faults that no batch size moves."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pipeline_lib.artifacts.progress import Progress
from pipeline_lib.config.errors import UserError
from pipeline_lib.evaluation.base import Subject
from pipeline_lib.numerics.philox import LOW, philox4x32
from pipeline_lib.numerics.streams import site_key

_TAG = 0x746F6B65  # "toke": counter word 3 of the numbers behind a sampled token


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn: logits / temperature, then the `top_k` most likely (None: all), then the most likely ones
    whose probabilities reach `top_p`; `seed` (any integers) names the random stream."""

    temperature: float
    top_k: int | None
    top_p: float
    seed: tuple[int, ...] = (0,)


@dataclass
class Continuation:
    """What followed a prompt.

    Attributes:
        tokens: new token ids, without the end-of-text token.
        finished: whether the model ended it.
        not_finite: tokens chosen while logits held NaN or infinity.
    """

    tokens: list[int] = field(default_factory=list)
    finished: bool = False
    not_finite: int = 0


def decode(
    subject: Subject, prompts: list[list[int]], max_new_tokens: int, sampling: Sampling | None
) -> list[Continuation]:
    """Continue every prompt; in the order given.

    A batch goes on from where its shortest prompt ends; the longer ones are given their own next token until theirs do.
    So nothing is padded, and every token stands where it would alone: padding would move positions within the fault
    streams. The longest of a batch is at most `max_new_tokens` longer than the shortest, which bounds the passes by
    twice those of the shortest. Sequence i of the fault streams is prompt i of those sorted by length (stable), so
    neither its faults nor its random numbers depend on the batch size.

    Args:
        subject: a causal language model.
        prompts: token ids, at least one each.
        sampling: None: the most likely token, the lower id of equal ones.

    Raises:
        UserError: the model is none, or has too few positions.
    """
    model = subject.model
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise UserError(
            "continuation of prompts needs a causal language model",
            value=type(model).__name__,
            fix="choose another task",
        )
    longest = max(map(len, prompts)) + max_new_tokens
    most = getattr(model.config, "max_position_embeddings", None)
    if isinstance(most, int) and longest > most:
        raise UserError(
            "prompt and continuation together are longer than the model's positions",
            value=longest,
            allowed=f"up to {most} tokens",
            fix="lower max_new_tokens, or shorten the prompts",
        )
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    found = [Continuation() for _ in prompts]
    with Progress("generate", len(prompts), "prompts") as progress:
        first = 0
        while first < len(order):
            most_tokens = len(prompts[order[first]]) + max_new_tokens
            batch = [i for i in order[first : first + subject.batch_size] if len(prompts[i]) <= most_tokens]
            if subject.context is not None:
                subject.context.begin(0, first)
            _decode_batch(subject, prompts, batch, found, max_new_tokens, sampling)
            progress.update(len(batch))
            first += len(batch)
    return found


@torch.no_grad()
def _decode_batch(
    subject: Subject,
    prompts: list[list[int]],
    batch: list[int],
    found: list[Continuation],
    max_new_tokens: int,
    sampling: Sampling | None,
) -> None:
    from transformers import DynamicCache

    model: Any = subject.model
    device = next(model.parameters()).device
    ends = _end_tokens(subject)
    options: dict[str, Any] = {"use_cache": True, "past_key_values": DynamicCache(config=model.config)}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = 1
    lengths = [len(prompts[index]) for index in batch]
    inputs_BT = torch.tensor([prompts[index][: min(lengths)] for index in batch], device=device)
    for position in range(min(lengths), max(lengths) + max_new_tokens):  # of the token to be chosen
        logits_BV = model(input_ids=inputs_BT, **options).logits[:, -1].float()
        finite_B = torch.isfinite(logits_BV).all(dim=1).tolist()
        next_B = choose(logits_BV, sampling, batch, [max(position - length, 0) for length in lengths]).tolist()
        for row, index in enumerate(batch):
            continuation = found[index]
            if position < lengths[row]:
                next_B[row] = prompts[index][position]
            elif not (continuation.finished or len(continuation.tokens) == max_new_tokens):
                continuation.not_finite += not finite_B[row]
                continuation.finished = next_B[row] in ends
                if not continuation.finished:
                    continuation.tokens.append(next_B[row])
        if all(found[index].finished or len(found[index].tokens) == max_new_tokens for index in batch):
            break
        inputs_BT = torch.tensor(next_B, device=device)[:, None]


def choose(logits_BV: Tensor, sampling: Sampling | None, prompts: list[int], steps: list[int]) -> Tensor:
    """The next token of each row; [B] int64.

    Sampling takes the largest of log-probability + Gumbel noise, which draws from the probabilities exactly (Maddison,
    Tarlow, Minka, "A* Sampling", 2014, section 2), with noise that belongs to (seed, prompt, step, token): runs whose
    logits hardly differ then write the same text, so that what a fault changes stands out. NaN counts as minus
    infinity; where no logit is above it all tokens are alike.

    Args:
        logits_BV: float32.
        sampling: None: the most likely token.
        prompts: what each row's random stream is named after.
        steps: of each row, its new tokens before this one.
    """
    lowest = torch.finfo(torch.float32).min
    logits_BV = torch.nan_to_num(logits_BV, nan=lowest)
    if sampling is None:
        return logits_BV.argmax(dim=1)
    count = min(sampling.top_k or logits_BV.shape[1], logits_BV.shape[1])
    values_BK, tokens_BK = logits_BV.double().topk(count, dim=1)
    scores_BK = ((values_BK - values_BK[:, :1]) / sampling.temperature).log_softmax(dim=1)
    p_BK = scores_BK.exp()
    scores_BK = scores_BK.masked_fill(p_BK.cumsum(dim=1) - p_BK >= sampling.top_p, -torch.inf)
    best_B1 = (scores_BK + _gumbel(sampling.seed, prompts, steps, tokens_BK)).argmax(dim=1, keepdim=True)
    return tokens_BK.gather(1, best_B1)[:, 0]


def _gumbel(seed: tuple[int, ...], prompts: list[int], steps: list[int], tokens_BK: Tensor) -> Tensor:
    """Standard Gumbel noise of (seed, prompt, step, token), float64 in the shape of `tokens_BK`."""
    device = tokens_BK.device
    key = site_key(seed[0], "sampling", "/".join(map(str, seed[1:])))
    k0, k1, tag = (torch.tensor(value, device=device) for value in (key & LOW, key >> 32 & LOW, _TAG))
    row_B1, at_B1 = (torch.tensor(values, device=device)[:, None] for values in (prompts, steps))
    high, low, *_ = philox4x32(tokens_BK, row_B1, at_B1, tag, k0, k1)
    uniform = ((high << 20 | low >> 12).double() + 0.5) * 2.0**-52  # in (0, 1)
    return -torch.log(-torch.log(uniform))


def _end_tokens(subject: Subject) -> set[int]:
    configured: Any = getattr(subject.model.generation_config, "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    own: Any = subject.tokenizer.eos_token_id
    return {int(token) for token in (*listed, own) if token is not None}
