"""Hiding tokens for an encoder to find: which ones is a function of a seed and a place, not of a device or a batch."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pipeline_lib.config.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""Label of a position that is no target."""

KEPT, RANDOM = 0.1, 0.1
"""Shares of the tokens to predict that are shown as they are, and as a random token (Devlin et al., 2019)."""


def mask_seed(seed: int, step: int, sequence: int) -> int:
    """Seed of the masks of one sequence of one step; no two share any."""
    digest = hashlib.sha256(f"mask/{seed}/{step}/{sequence}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def hide_tokens(
    text_T: Tensor, special_T: Tensor, mask: int, vocab: int, rate: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Hide tokens for an encoder to find.

    Each token that is not special is a target with probability `rate`. Of the targets 80 % become the mask
    token, 10 % a random token, 10 % stay.

    Args:
        text_T: int64 token ids.
        special_T: bool, tokens never to hide.
        mask: id of the mask token.
        vocab: random tokens are drawn uniformly from 0 … vocab-1.
        rate: share of targets.
        generator: advanced by the same amount whatever the text.

    Returns:
        input_T, labels_T: int64; labels are IGNORED where there is no target.
    """
    target_T = (torch.rand(text_T.shape, generator=generator) < rate) & ~special_T
    fate_T = torch.rand(text_T.shape, generator=generator)
    random_T = torch.randint(vocab, text_T.shape, generator=generator)
    shown_T = torch.where(fate_T < KEPT, text_T, torch.where(fate_T < KEPT + RANDOM, random_T, mask))
    return torch.where(target_T, shown_T, text_T), torch.where(target_T, text_T, IGNORED)


def special_tokens_of(tokenizer: PreTrainedTokenizerBase, where: str) -> tuple[int, Tensor]:
    """(id of the token that hides others, ids of all special tokens).

    Where the tokenizer has no mask token, its padding token serves: packed text contains none.

    Raises:
        UserError: padding is a token that text contains.
    """
    given: Any = tokenizer
    mask = given.mask_token_id
    if mask is None and given.pad_token_id not in (given.eos_token_id, given.bos_token_id):
        mask = given.pad_token_id
    if mask is None:
        raise UserError(
            "an encoder reads masked tokens, and the tokenizer has neither a mask nor a padding token to spare",
            where=where,
            value=given.name_or_path,
            fix="train a tokenizer here, or use one from the hub that has a mask token",
        )
    return mask, torch.tensor(given.all_special_ids)
