"""Distribution of |x| over the operands of linear layers, counted in bins that are bit patterns."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pipeline_lib.artifacts.progress import Progress
from pipeline_lib.config.errors import UserError
from pipeline_lib.evaluation.base import Subject
from pipeline_lib.transforms.base import Site
from pipeline_lib.transforms.patterns import matches

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHIFT = 16  # a bin holds the float32 values that agree in their upper 16 bits: 2⁻⁷ wide, relative to the value
_BINS = 2 ** (31 - _SHIFT)
_INFINITE = 0x7F80_0000 >> _SHIFT


class Magnitudes:
    """How often |x| fell into each bin. Exact counts, so batches and their order make no difference."""

    def __init__(self) -> None:
        self.counts = torch.zeros(_BINS, dtype=torch.int64)
        self.max = 0.0

    def add(self, x: Tensor) -> None:
        """Count the elements of `x`, of any floating dtype and shape."""
        size = x.detach().float().abs().flatten()
        self.counts += torch.bincount(size.view(torch.int32) >> _SHIFT, minlength=_BINS).cpu()
        finite = torch.where(torch.isfinite(size), size, 0.0)
        self.max = max(self.max, float(finite.max()) if finite.numel() else 0.0)

    @property
    def not_finite(self) -> int:
        """Elements that were NaN or infinite."""
        return int(self.counts[_INFINITE:].sum())

    def top(self, share: float) -> float:
        """The lower end of the largest `share` of the finite values, rounded up to a bin's edge (by 2⁻⁷ of it at most).

        At most `share` of the values lie at or above it, unless it is the maximum itself.
        """
        counts = self.counts[:_INFINITE]
        above = counts.flip(0).cumsum(0).flip(0)  # values in this bin or a higher one
        allowed = math.floor(share * int(counts.sum()))
        edge = int((above > allowed).sum())  # the first bin that, with all above it, holds no more than allowed
        value = float(torch.tensor(edge << _SHIFT, dtype=torch.int32).view(torch.float32))
        return min(value, self.max)


def windows(
    texts: Callable[[], Iterable[str]], tokenizer: PreTrainedTokenizerBase, count: int | None, length: int
) -> Tensor:
    """`count` windows of `length` tokens of the documents, which follow each other, set apart by the end-of-text token.

    Without a count all there are, at least one; what is left over at the end is no window.

    Returns:
        int64 [count, length].

    Raises:
        UserError: too little text.
    """
    needed, ids = count and count * length, []
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for text in texts():
        ids += chain(tokenizer(text, add_special_tokens=False).input_ids, end)
        if needed is not None and len(ids) >= needed:
            break
    whole = len(ids) // length * length if needed is None else needed
    if length <= whole <= len(ids):
        return torch.tensor(ids[:whole]).view(-1, length)
    raise UserError(
        "the split has too little text",
        where="task: sequences",
        value=f"{len(ids)} tokens",
        allowed=f"{needed or length} = sequences × seq_len",
        fix="lower `sequences` or `seq_len`, or choose another split",
    )


def digest(tokens: Tensor) -> str:
    """SHA-256 of token ids."""
    return hashlib.sha256(tokens.numpy().tobytes()).hexdigest()


@torch.no_grad()
def measure(subject: Subject, text_BT: Tensor, pattern: str, share: float) -> list[dict[str, Any]]:
    """{layer, input: {top, max, not_finite}, weight: {…}} of each linear layer of that pattern, in the model's order.

    Raises:
        UserError: the pattern matches no linear layer.
    """
    named = {name: module for name, module in subject.model.named_modules() if isinstance(module, nn.Linear)}
    layers = {name: module for name, module in named.items() if matches(pattern, Site("linear", name))}
    if not layers:
        raise UserError(
            "the pattern matches no linear layer",
            where="task ranges: layers",
            value=pattern,
            allowed=f"patterns on {', '.join(list(named)[:24])}",
            fix="correct the pattern; * crosses dots",
        )
    inputs = {name: Magnitudes() for name in layers}
    hooks = [module.register_forward_pre_hook(partial(_count, inputs[name])) for name, module in layers.items()]
    try:
        with Progress("ranges", len(text_BT), "sequences") as progress:
            for first in range(0, len(text_BT), subject.batch_size):
                batch_BT = text_BT[first : first + subject.batch_size]
                if subject.context is not None:
                    subject.context.begin(0, first)
                subject.model(input_ids=batch_BT.to(subject.model.device))
                progress.update(len(batch_BT))
    finally:
        for hook in hooks:
            hook.remove()
    found = []
    for name, module in layers.items():
        weight = Magnitudes()
        weight.add(module.weight)
        operands = (("input", inputs[name]), ("weight", weight))
        found.append({"layer": name, **{operand: _summary(seen, share) for operand, seen in operands}})
    return found


def _count(seen: Magnitudes, _module: nn.Module, arguments: tuple[Any, ...]) -> None:
    seen.add(arguments[0])


def _summary(seen: Magnitudes, share: float) -> dict[str, Any]:
    return {"top": seen.top(share), "max": seen.max, "not_finite": seen.not_finite}
