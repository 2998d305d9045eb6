"""The recipe `distill`: a frozen teacher beside the student, and their divergence, a few positions at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline_lib.artifacts.job import Job
from pipeline_lib.artifacts.progress import say
from pipeline_lib.config.errors import UserError
from pipeline_lib.data.records import RecordLoader
from pipeline_lib.models.checkpoint import checkpoint_directory, load_model
from pipeline_lib.training import distributed
from pipeline_lib.training.build import autocast
from pipeline_lib.training.divergences import DIVERGENCES, cross_entropy, token_scale
from pipeline_lib.training.freezing import freeze, share
from pipeline_lib.training.heads import assert_plain_head, head_replaced, hidden_states
from pipeline_lib.training.hooks import Batch, Hooks
from pipeline_lib.training.losses import IGNORED, count_targets
from pipeline_lib.transforms.context import FaultContext

if TYPE_CHECKING:
    from pipeline_lib.training.loop import Loop

Piece = Callable[[Tensor, slice], Tensor]
"""(hidden [B, C, D], positions) → the summed loss [B] of those positions."""


class DistillHooks(Hooks):
    """Learns a teacher's next-token distributions at the tokens of the teacher's records.

    Logits exist for `chunk` positions at a time: the head is run inside the loss, and again in the backward pass.
    So no tensor of batch × time × vocabulary is ever made, of neither model.

    Attributes:
        teacher: in evaluation mode, on the student's device, plain; None for the loss `ce`.
        gamma: weight of KL(student‖teacher) in `cakld`; part of a checkpoint.
    """

    def __init__(self, settings: Any, job: Job) -> None:
        super().__init__(settings, job.settings["seed"])
        self.settings: Any = settings
        self._job = job
        self.original = settings.variant == "original"
        self.teacher: Any = None
        self.gamma: float | None = settings.gamma
        self._valid_loss: dict[int, float] = {}
        self._context: FaultContext

    # -- data ------------------------------------------------------------------------------------------------------

    def loader(self, split: Literal["train", "valid"] = "train") -> RecordLoader:
        """The records of a split."""
        recipe = self.settings
        loader = RecordLoader(
            self._job.inputs["teacher"],
            recipe.seq_len,
            recipe.global_batch,
            self.seed,
            split,
            valid_share=recipe.valid_share,
            mask_prompt=recipe.mask_prompt and not self.original,
            keep_last=self.original,
        )
        if distributed.rank() == 0 and (loader.truncated or loader.unusable):
            say(
                f"{split}: {loader.truncated} records are cut at seq_len {recipe.seq_len}, {loader.unusable} left out "
                f"because their prompt fills it, {loader.n_sequences} are read"
            )
        return loader

    def targets(self, batch: Batch) -> int:
        """Positions that count; the published code divides by sequences instead."""
        return len(batch["labels"]) if self.original else count_targets(batch["labels"])

    # -- models ----------------------------------------------------------------------------------------------------

    def prepare(self, loop: Loop) -> None:
        """Freeze what is to stay, load the teacher, and make sure that the two speak of the same tokens.

        Raises:
            UserError: a pattern of `freeze` matches nothing, the models' vocabularies differ, or the student's
                logits are more than its head's product.
        """
        self._context, model = loop.context, loop.model
        largest = loop.loader.largest_id
        if largest >= model.get_input_embeddings().num_embeddings:
            raise _vocabularies("the records' largest token id", largest, "the student's embedding", model)
        frozen = freeze(model, self.settings.freeze)
        assert_plain_head(model)
        if self.settings.loss == "ce":
            return
        dtype = "bfloat16" if self.settings.precision == "bf16" else "float32"
        self.teacher = load_model(checkpoint_directory(self._job.inputs["teacher-model"]), dtype)
        self.teacher.requires_grad_(False)
        if self.teacher.get_output_embeddings().weight.shape[0] != model.get_output_embeddings().weight.shape[0]:
            raise _vocabularies("the teacher's head", self.teacher.vocab_size, "the student's head", model)
        assert_plain_head(self.teacher)
        alike = self._job.inputs["teacher-model"].resolve() == self._job.inputs["init"].resolve()
        if frozen and alike and distributed.world() == 1:
            share(model, self.teacher, frozen)
        self.teacher.to(loop.device)

    # -- loss ------------------------------------------------------------------------------------------------------

    def select(self, loop: Loop, step: int, batches: list[tuple[int, Batch]]) -> list[tuple[int, Batch]]:
        """Estimate gamma before the first step that needs it."""
        if self.settings.loss == "cakld" and self.gamma is None:
            self.gamma = self._estimate_gamma(loop)
            if distributed.rank() == 0:
                say(f"cakld: gamma {self.gamma:.6f}")
        return batches

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """loss_B: the divergence, summed over each sequence's positions that count."""
        ids_BT, labels_BT = batch["input_ids"], batch["labels"]
        mask_BT = self._mask(labels_BT)
        hidden_BTD = None if self.teacher is None else hidden_states(self.teacher, ids_BT)
        weight_BT = mask_BT.float()
        if self.settings.loss == "tlsd":
            weight_BT = self._scale(hidden_BTD, labels_BT, mask_BT)

        def piece(head: nn.Module, student_BCD: Tensor, at: slice) -> Tensor:
            with self._at_position(at.start):
                logits_BCV = head(student_BCD).float()
            if hidden_BTD is None:
                loss_BC = cross_entropy(logits_BCV, labels_BT[:, at])
            else:
                loss_BC = self._divergence(logits_BCV, self._teacher_logits(hidden_BTD[:, at]))
            return (loss_BC * weight_BT[:, at]).sum(1)

        wanted_T = weight_BT.any(0)
        with head_replaced(model, lambda head, h: self._in_chunks(lambda h, at: piece(head, h, at), h, wanted_T)):
            return model(input_ids=ids_BT, use_cache=False).logits

    def _in_chunks(self, piece: Piece, hidden_BTD: Tensor, wanted_T: Tensor) -> Tensor:
        """The sum of `piece` over all positions, each chunk's logits made anew in the backward pass.

        Chunks without a wanted position are skipped, but for the first if there is none at all: every rank's head
        must have a gradient.
        """
        size, total = self.settings.chunk, hidden_BTD.shape[1]
        chunks = [slice(start, min(start + size, total)) for start in range(0, total, size)]
        kept = [at for at in chunks if bool(wanted_T[at].any())] or chunks[:1]
        # Contiguous, or torch multiplies by a copy of the head for each sequence.
        losses = [checkpoint(piece, hidden_BTD[:, at].contiguous(), at, use_reentrant=False) for at in kept]
        return torch.stack(losses).sum(0)  # type: ignore[arg-type]

    def _divergence(self, student_BCV: Tensor, teacher_BCV: Tensor) -> Tensor:
        recipe = self.settings
        extra = {"jsd": (recipe.jsd_beta,), "cakld": (self.gamma,)}.get(recipe.loss, ())
        return DIVERGENCES[recipe.loss](student_BCV / recipe.temperature, teacher_BCV / recipe.temperature, *extra)

    def _mask(self, labels_BT: Tensor) -> Tensor:
        """Positions that count; in the published code all that hold a token, but for what next-token losses need."""
        labelled_BT = labels_BT != IGNORED
        if not self.original or self.settings.loss == "ce":
            return labelled_BT
        if self.settings.loss == "tlsd":
            return torch.ones_like(labelled_BT)
        held_BT = labelled_BT.clone()
        held_BT[:, 1:] |= labelled_BT[:, :-1]
        return held_BT

    def _scale(self, hidden_BTD: Tensor | None, labels_BT: Tensor, mask_BT: Tensor) -> Tensor:
        assert hidden_BTD is not None
        parts = hidden_BTD.split(self.settings.chunk, 1), labels_BT.split(self.settings.chunk, 1)
        surprise = [cross_entropy(self._teacher_logits(h), labels) for h, labels in zip(*parts, strict=True)]
        weight_BT = token_scale(torch.cat(surprise, 1), mask_BT)
        if self.original:  # weights add up to 1, and the published code sums over the batch where others average
            weight_BT = weight_BT / mask_BT.sum(1, keepdim=True) * self.settings.global_batch
        return weight_BT

    @torch.no_grad()
    def _teacher_logits(self, hidden_BCD: Tensor) -> Tensor:
        return self.teacher.get_output_embeddings()(hidden_BCD.contiguous()).float()

    @contextmanager
    def _at_position(self, first: int) -> Iterator[None]:
        """The head's faults are those of positions `first` …; also when autograd runs it again, and stops half-way."""
        self._context.move(first)
        try:
            yield
        finally:
            self._context.move(0)

    @torch.no_grad()
    def _estimate_gamma(self, loop: Loop) -> float:
        """The teacher's confidence in the records.

        Corrected: its mean probability of the tokens that are learnt, over `gamma_batches` global batches. Original:
        its mean largest probability over all positions, padding too, of one batch more than the mean is divided by.
        """
        recipe, micro = self.settings, loop.sharing.micro_batch
        batches = recipe.gamma_batches + 1 if self.original else recipe.gamma_batches
        total, count = 0.0, 0
        for step in range(batches):
            for first in range(0, recipe.global_batch, micro):
                numbers = [int(k) for k in loop.loader.sequences(step, first, micro)]
                padded = loop.loader.pad(
                    numbers, recipe.seq_len if self.original else max(map(loop.loader.length, numbers))
                )
                ids_BT, labels_BT = (tensor.to(loop.device) for tensor in padded)
                with autocast(loop.device, recipe.precision):
                    sure_BT, counted_BT = self._confidence(ids_BT, labels_BT)
                total += float(sure_BT.double()[counted_BT].sum())
                count += int(counted_BT.sum())
        if self.original:
            return total / count * batches / recipe.gamma_batches
        return total / max(count, 1)

    def _confidence(self, ids_BT: Tensor, labels_BT: Tensor) -> tuple[Tensor, Tensor]:
        hidden_BTD, parts = hidden_states(self.teacher, ids_BT), []
        for start in range(0, ids_BT.shape[1], self.settings.chunk):
            at = slice(start, start + self.settings.chunk)
            p_BCV = torch.softmax(self._teacher_logits(hidden_BTD[:, at]), -1)
            label_BC1 = labels_BT[:, at].clamp(min=0).unsqueeze(-1)
            parts.append(p_BCV.amax(-1) if self.original else p_BCV.gather(-1, label_BC1).squeeze(-1))
        counted_BT = torch.ones_like(labels_BT, dtype=torch.bool) if self.original else labels_BT != IGNORED
        return torch.cat(parts, 1), counted_BT

    # -- validation, and what a checkpoint holds -----------------------------------------------------------------------

    def after_step(self, loop: Loop, step: int) -> None:
        """Validate where it is due."""
        if self.settings.valid_every and step % self.settings.valid_every == 0:
            found = self.validate(loop)
            loop.figures |= {} if found is None else {"valid_loss": found}

    @torch.no_grad()
    def validate(self, loop: Loop) -> float | None:
        """The training loss on the records kept for validation, divided alike; None if there are none."""
        if loop.step in self._valid_loss:
            return self._valid_loss[loop.step]
        loader, micro = self.loader("valid"), loop.sharing.micro_batch
        if not loader.n_sequences:
            return None
        loop.model.eval()
        total, targets = 0.0, 0
        for first in range(0, loader.n_sequences, micro):
            numbers = list(range(first, min(first + micro, loader.n_sequences)))
            inputs_BT, labels_BT = loader.pad(numbers, max(loader.length(n) for n in numbers))
            batch = {"input_ids": inputs_BT.to(loop.device), "labels": labels_BT.to(loop.device)}
            # Faults of their own: those of further sequences of the step that was done last.
            loop.context.begin(max(loop.step - 1, 0), self.settings.global_batch + first)
            with autocast(loop.device, self.settings.precision):
                total += float(self.loss(loop.model, batch).double().sum())
            targets += self.targets(batch)
        loop.model.train()
        self._valid_loss = {loop.step: total / max(targets, 1)}
        return self._valid_loss[loop.step]

    def result(self, loop: Loop) -> dict[str, Any]:
        """Gamma, the loss on held-out records, and how many records were read, cut and left out."""
        loader = loop.loader
        records = {"read": loader.n_sequences, "truncated": loader.truncated, "left_out": loader.unusable}
        return {"gamma": self.gamma, "valid_loss": self.validate(loop), "records": records}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Gamma: a resumed training goes on with the same."""
        return {}, {"gamma": self.gamma}

    def load(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Take gamma back."""
        self.gamma = values["gamma"]


def _vocabularies(one: str, size: int, other: str, model: Any) -> UserError:
    return UserError(
        f"{one} and {other} are of different vocabularies",
        where="recipe.distill",
        value=size,
        allowed=str(model.get_output_embeddings().weight.shape[0]),
        fix="use a teacher with the student's tokenizer",
    )
