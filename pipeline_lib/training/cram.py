"""The recipe `cram`: methods in order, and the account of the work that they do."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pipeline_lib.config.errors import UserError
from pipeline_lib.config.registry import METHODS
from pipeline_lib.models.blocks import blocks, only
from pipeline_lib.training import distributed
from pipeline_lib.training.batching import joined, length, micro_seed, rows_of
from pipeline_lib.training.budget import flops
from pipeline_lib.training.build import autocast
from pipeline_lib.training.flops import forward_parts
from pipeline_lib.training.hooks import Batch
from pipeline_lib.training.losses import IGNORED
from pipeline_lib.training.masking import TextHooks
from pipeline_lib.training.meter import Meter
from pipeline_lib.training.methods import Method
from pipeline_lib.training.optimizers import decay_groups, decayed
from pipeline_lib.training.schedules import budget_lr_factor
from pipeline_lib.training.settings import option
from pipeline_lib.training.work import Price, Work

if TYPE_CHECKING:
    from pipeline_lib.artifacts.job import Job
    from pipeline_lib.training.loop import Loop
    from pipeline_lib.training.recipes.cram import Settings


class CramHooks(TextHooks):
    """What a method may use, and what the engine asks.

    Attributes:
        methods: in the order of the recipe's list.
        work: passes done; charged before the step that they belong to.
        place: sequences of the training text read so far, by all ranks together.
        meter: what of a `budget` is spent; None where the training is counted in steps.
    """

    settings: Settings

    def __init__(self, settings: Settings, job: Job) -> None:
        super().__init__(settings, job)
        self.methods: list[Method] = [METHODS.load(s.type).method(s, job) for s in settings.methods]  # type: ignore[attr-defined]
        self.work, self.place = Work(), 0
        self.meter: Meter | None = None
        self._active: Collection[int] = ()
        self._present: Collection[int] = ()
        self._valid_at = 0
        self._draws = any(type(method).draw is not Method.draw for method in self.methods)
        self._groups = [method.group for method in self.methods if method.group is not None]

    @property
    def accounted(self) -> bool:
        """Whether its work is part of the result."""
        return self.settings.budget is not None or bool(self.methods)

    def prepare(self, loop: Loop) -> None:
        """Count the model's layers and FLOPs; prepare the methods."""
        super().prepare(loop)
        self.loop, self.depth = loop, len(blocks(loop.model))
        if self._groups and distributed.world() > 1 and option(self._job, "compile", False):
            raise UserError(
                "a compiled layer cannot stand by while another rank runs it",
                where="run.compile",
                value=True,
                fix="set compile to false, train on one device, or remove the method that leaves layers out",
            )
        self.flops: Price = flops(*forward_parts(loop.model, self.settings.seq_len, self._head_share()))
        if self.settings.budget is not None:
            self.meter = Meter(self.settings.budget, self.work, self.flops, self._job)
        for method in self.methods:
            method.cram, method.loop = self, loop
            method.prepare()

    def _head_share(self) -> float:
        """Share of tokens that the model's head is computed for."""
        return self.settings.mask_rate if self.encoder and hasattr(self.loop.model, "masked_logits") else 1.0

    # -- what is spent -------------------------------------------------------------------------------------------------

    def spent(self) -> float:
        """What the steps so far cost, in the budget's unit; steps where there is no `budget`."""
        return float(self.loop.step) if self.meter is None else self.meter.spent()

    def progress(self, step: int) -> float:
        """Share of the budget spent so far; between steps that is after `step` of them."""
        return super().progress(step) if self.meter is None else self.meter.share()

    def lr_factor(self, step: int) -> float:
        """The schedule where the budget stands when this step is done: its end meets the schedule's end."""
        recipe = self.settings
        if self.meter is None:
            factor, progress = super().lr_factor(step), (step + 1) / self._steps
        else:
            progress = self.meter.ahead()
            factor = budget_lr_factor(progress, recipe.warmup_fraction or 0.0, recipe.decay, recipe.min_lr_factor)
        for method in self.methods:
            if method.lr is not None:
                factor *= method.lr / recipe.lr
            factor *= method.lr_factor(progress)
        return factor

    # -- text ----------------------------------------------------------------------------------------------------------

    def fresh(self, count: int) -> Batch:
        """The next `count` sequences of the training text, on the CPU and on every rank; they count as read."""
        batch = self._text(self.place, count)
        self.place += count
        return batch

    def _text(self, place: int, count: int) -> Batch:
        """The sequences from `place` on; each has its own mask and is known by its `place` and its number."""
        whole, loader, parts = self.settings.global_batch, self.loop.loader, []
        while count:
            step, first = divmod(place, whole)
            size = min(count, whole - first)
            part = self.batch(loader, step, first, size)
            part["sequence"] = torch.from_numpy(loader.sequences(step, first, size))
            part["place"] = torch.arange(place, place + size)
            parts.append(part)
            place, count = place + size, count - size
        return joined(parts)

    def read(self, loop: Loop, step: int) -> list[tuple[int, Batch]]:
        """This rank's share of what the methods choose to train on, cut where the layers change."""
        if self.meter is not None:
            self.meter.start()
        for method in self.methods:
            method.before_step(step)
        count = self.settings.global_batch
        if self._draws:
            drawn = self._draw(step, self.methods, count)
            rows = [(first, rows_of(drawn, first, loop.sharing.micro_batch)) for first in loop.sharing.firsts()]
        else:  # a rank need not read what others train on
            rows = [
                (first, self._text(self.place + first, loop.sharing.micro_batch)) for first in loop.sharing.firsts()
            ]
            self.place += count
        self._charge(step, count)
        size = self._piece()
        return [(first + at, rows_of(batch, at, size)) for first, batch in rows for at in range(0, length(batch), size)]

    def _draw(self, step: int, methods: Sequence[Method], count: int) -> Batch:
        if not methods:
            return self.fresh(count)
        return methods[-1].draw(step, count, partial(self._draw, step, methods[:-1]))

    def _piece(self) -> int:
        """Sequences of a forward pass: a micro-batch, or what of it goes through the same layers."""
        micro = self.loop.sharing.micro_batch
        size = min([micro, *self._groups])
        if any(whole % size for whole in (micro, *self._groups)):
            raise UserError(
                "a micro-batch holds parts of groups that go through different layers",
                where="run.micro_batch",
                value=micro,
                allowed=f"divisors and multiples of {self._groups}",
                fix="change micro_batch",
            )
        return size

    def _charge(self, step: int, count: int) -> None:
        size = min([count, *self._groups])
        for first in range(0, count, size):
            layers = len(self.active(step, first, training=True))
            self.work.add("train", layers, min(size, count - first))

    # -- passes --------------------------------------------------------------------------------------------------------

    def active(self, step: int, first: int = 0, training: bool = False) -> list[int]:
        """The layers that sequences of a step go through."""
        layers: Sequence[int] = range(self.depth)
        for method in self.methods:
            layers = method.layers(layers, step, first, training)
        return list(layers)

    def begin(self, step: int, first: int) -> None:
        """Choose the layers of the next training pass, and learn which ones other ranks run beside it."""
        sharing = self.loop.sharing
        self._active = self.active(step, first, training=True)
        beside = (first + (rank - sharing.rank) * sharing.micro_batch for rank in range(sharing.world))
        self._present = {layer for at in beside for layer in self.active(step, at, training=True)}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """loss_B, through the chosen layers, weighed by the methods."""
        with only(model, self._active, self._present):
            loss_B = super().loss(model, batch)
        for method in self.methods:
            loss_B = method.weigh(batch, loss_B)
        return loss_B

    def shares(self, batch: Batch) -> list[tuple[int, Batch]]:
        """This rank's micro-batches of a batch that every rank holds, on its device: (index of the first row, rows).

        All ranks get as many; where the rows do not suffice, the last ones come again.
        """
        count, ranks, micro = length(batch), distributed.world(), self.loop.sharing.micro_batch
        each = -(-count // ranks)
        rows = torch.arange(distributed.rank() * each, (distributed.rank() + 1) * each).clamp(max=count - 1)
        return [
            (int(part[0]), self.loop.to_device({name: tensor[part] for name, tensor in batch.items()}))
            for part in rows.split(micro)
        ]

    @torch.no_grad()
    def losses(self, batch: Batch, step: int) -> Tensor:
        """Mean loss of each sequence's targets, fp32 on the CPU, the same on every rank; charged as forward passes.

        Args:
            batch: on the CPU, the same on every rank.
        """
        count = length(batch)
        self.work.add("forward", len(self.active(step)), count, free=not self.settings.track_forward_pass_only)
        return self._looked_at(batch, step)

    @torch.no_grad()
    def _looked_at(self, batch: Batch, step: int) -> Tensor:
        loop, count, found = self.loop, length(batch), []
        was_training = loop.model.training
        loop.model.eval()
        for first, rows in self.shares(batch):
            torch.manual_seed(micro_seed(self.seed, step, first))
            loop.context.begin(step, first % self.settings.global_batch)
            with autocast(loop.device, self.settings.precision), only(loop.model, self.active(step)):
                loss_B = TextHooks.loss(self, loop.model, rows)
            targets_B = (rows["labels"] != IGNORED).sum(dim=1).clamp(min=1)
            found.append(loss_B / targets_B)
        loop.model.train(was_training)
        return distributed.gathered(torch.cat(found))[:count]

    # -- the engine's other questions ----------------------------------------------------------------------------------

    def optimizer(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        """The optimizer of the method that brings one, or AdamW."""
        matrices, others = decayed(self.loop.model, self.settings.decay_norms)
        for method in self.methods:
            found = method.optimizer(matrices, others)
            if found is not None:
                return found
        recipe = self.settings
        groups = decay_groups(matrices, others, recipe.weight_decay)
        return torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, eps=recipe.eps, fused=True)

    def after_step(self, loop: Loop, step: int) -> None:
        """Stop the clock; let the methods act; measure the validation loss where it is due."""
        for method in self.methods:
            method.after_step(step)
        if self.meter is not None:
            self.meter.stop()
            loop.figures["progress"], loop.figures["spent"] = self.progress(step), self.spent()
        self._validate(step)

    def _validate(self, step: int) -> None:
        every = self.settings.valid_every
        if every is None:
            return
        due = int(self.spent() / every)
        if due > self._valid_at or self.progress(step) >= 1:
            self._valid_at = due
            self.loop.figures["valid_loss"] = self.valid_loss(step)

    def valid_loss(self, step: int) -> float:
        """Mean loss of the validation split's first sequences, masked alike in every training; it costs nothing."""
        batch = self._held_out(self.settings.valid_sequences)
        targets_N = (batch["labels"] != IGNORED).sum(dim=1)
        return float((self._looked_at(batch, step).double() * targets_N).sum() / targets_N.sum().clamp(min=1))

    def result(self, loop: Loop) -> dict[str, Any]:
        """What was read and done, and what it cost."""
        if not self.accounted:
            return {}
        return {
            "work": self.work.table(),
            "flops": self.work.cost(self.flops),
            "flops_not_charged": self.work.cost(self.flops, free=True),
            **({"rst_hours": self.spent()} if self.settings.budget and self.settings.budget.rst_hours else {}),
            "sequences_read": self.place,
            "epochs": self.place / loop.loader.n_sequences,
            "methods": {s.type: method.result() for s, method in zip(self.settings.methods, self.methods, strict=True)},  # type: ignore[attr-defined]
        }

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Work, place in the text, clock, and what the methods remember."""
        tensors: dict[str, Tensor] = {}
        values: dict[str, Any] = {"work": self.work.table(), "place": self.place, "valid_at": self._valid_at}
        values |= {"meter": None if self.meter is None else self.meter.state(), "methods": []}
        for number, method in enumerate(self.methods):
            own, more = method.state()
            tensors |= {f"{number}/{name}": tensor for name, tensor in own.items()}
            values["methods"].append(more)
        return tensors, values

    def load(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Take back what `state` gave."""
        self.work.load(values["work"])
        self.place, self._valid_at = values["place"], values["valid_at"]
        if self.meter is not None:
            self.meter.load(values["meter"])
        for number, (method, more) in enumerate(zip(self.methods, values["methods"], strict=True)):
            mark = f"{number}/"
            method.load({name.removeprefix(mark): t for name, t in tensors.items() if name.startswith(mark)}, more)
