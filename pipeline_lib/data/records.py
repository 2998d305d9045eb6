"""Teacher records: what a teacher was asked and what it said, and the batches that distillation reads from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pipeline_lib.config.errors import UserError
from pipeline_lib.data.order import SequenceOrder

if TYPE_CHECKING:
    from torch import Tensor

RECORDS = "records.jsonl"
NO_TARGET = -100
GRAIN = 16  # batches are as long as their longest record, rounded up to a multiple of this


def read_records(artifact: Path) -> list[dict[str, Any]]:
    """The records of a teacher artifact, in order.

    Each has id, messages, completion (text), prompt_ids and completion_ids (token ids; the end-of-turn token is the
    last of them where the teacher ended by itself) and metadata.
    """
    with open(artifact / RECORDS, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


class RecordLoader:
    """Batches of records, padded on the right, in an order that depends on nothing but the seed.

    The first `valid_share` of the records is for validation, the rest for training: records are in random order and
    have different prompts. Records longer than seq_len are cut at their end; one whose prompt fills seq_len has
    nothing to learn and is left out. Place in the order, sharing among ranks and resume are as in `BatchLoader`.

    Attributes:
        n_sequences: records that are read.
        truncated, unusable: how many of the split were cut, and left out.
    """

    def __init__(
        self,
        artifact: Path,
        seq_len: int,
        global_batch: int,
        seed: int,
        split: Literal["train", "valid"] = "train",
        valid_share: float = 0.2,
        mask_prompt: bool = True,
        keep_last: bool = False,
    ) -> None:
        """`keep_last`: inputs hold the last token too, which has no label.

        Raises:
            UserError: no record is left for the split.
        """
        records = read_records(artifact)
        n_valid = int(len(records) * valid_share)
        chosen = records[:n_valid] if split == "valid" else records[n_valid:]
        self.artifact, self.seq_len, self.global_batch, self.mask_prompt = artifact, seq_len, global_batch, mask_prompt
        self.keep_last = keep_last
        limit = seq_len if keep_last else seq_len + 1
        usable = [record for record in chosen if len(record["prompt_ids"]) < limit]
        self._ids = [(r["prompt_ids"], r["completion_ids"][: limit - len(r["prompt_ids"])]) for r in usable]
        self.unusable = len(chosen) - len(usable)
        self.truncated = sum(
            len(kept) < len(r["completion_ids"]) for r, (_, kept) in zip(usable, self._ids, strict=True)
        )
        self.n_sequences = len(self._ids)
        if not self._ids and split == "train":
            raise UserError(
                "no teacher record leaves a token to learn",
                where=str(artifact),
                value={"records": len(chosen), "longer prompts than seq_len": self.unusable},
                fix="raise seq_len, or ask for more records (recipe.distill.data.n)",
            )
        self.largest_id = max((max(p + c) for p, c in self._ids), default=0)
        self.order = SequenceOrder(max(self.n_sequences, 1), seed)

    def sequences(self, step: int, first: int, count: int) -> np.ndarray:
        """Numbers of the records first … first+count-1 of the global batch of `step`; int64 [count]."""
        if not 0 <= first <= first + count <= self.global_batch:
            raise IndexError(f"records {first}…{first + count} of a global batch of {self.global_batch}")
        return self.order.indices(step * self.global_batch + first + np.arange(count))

    def batch(self, step: int, first: int, count: int) -> tuple[Tensor, Tensor]:
        """(inputs, labels) of the records first … first+count-1 of the global batch of `step`.

        int64 [count, T], T as long as the longest of the whole global batch needs. Position t is to predict label t;
        labels are NO_TARGET at the prompt (unless it is not masked) and after the end.
        """
        longest = max(self.length(int(k)) for k in self.sequences(step, 0, self.global_batch))
        return self.pad([int(k) for k in self.sequences(step, first, count)], longest)

    def pad(self, numbers: list[int], length: int) -> tuple[Tensor, Tensor]:
        """(inputs, labels) of the records of these numbers, int64 [n, T]; none is longer than `length` tokens."""
        import torch

        width = min(-(-(length if self.keep_last else length - 1) // GRAIN) * GRAIN, self.seq_len)
        inputs_BT = torch.zeros(
            len(numbers), width, dtype=torch.int64
        )  # causal attention: what pads hold is never seen
        labels_BT = torch.full((len(numbers), width), NO_TARGET, dtype=torch.int64)
        for row, number in enumerate(numbers):
            tokens_T = torch.tensor(self._tokens(number))
            shown_T = tokens_T if self.keep_last else tokens_T[:-1]
            inputs_BT[row, : len(shown_T)] = shown_T
            labels_BT[row, : len(tokens_T) - 1] = tokens_T[1:]
            if self.mask_prompt:
                labels_BT[row, : len(self._ids[number][0]) - 1] = NO_TARGET
        return inputs_BT, labels_BT

    def length(self, number: int) -> int:
        """Tokens of a record, prompt and completion."""
        return len(self._tokens(number))

    def _tokens(self, number: int) -> list[int]:
        prompt, completion = self._ids[number]
        return prompt + completion
