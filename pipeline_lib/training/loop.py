"""The engine `loop`: our own training loop, for recipes that change more than the loss.

One process trains plainly; several shard the model with FSDP2. Each step: batch → select → loss →
backward → optimizer → after_step → budget. Losses stay per example until they are divided by the number
of targets of the whole step, over all ranks and micro-batches.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline_lib.artifacts.job import Job
from pipeline_lib.config.errors import Stopped, UserError
from pipeline_lib.data.tokens import BatchLoader, TokenShards
from pipeline_lib.models.blocks import blocks
from pipeline_lib.models.memory import MIB, Activations, activations, state_account
from pipeline_lib.training import distributed
from pipeline_lib.training.batching import Sharing, micro_seed
from pipeline_lib.training.build import apply_transform, autocast, initial_model, save_memory
from pipeline_lib.training.checkpoints import agreed_newest, checkpoint_name, prune, seal
from pipeline_lib.training.clipping import WeightClipping
from pipeline_lib.training.gradients import gradient_norm, not_finite
from pipeline_lib.training.hooks import Batch
from pipeline_lib.training.loss_scale import LossScale
from pipeline_lib.training.memory import peak_memory
from pipeline_lib.training.metrics import MetricsLog
from pipeline_lib.training.outcome import Tail, publish
from pipeline_lib.training.run import recipe_of
from pipeline_lib.training.settings import option
from pipeline_lib.training.signals import StopRequest
from pipeline_lib.training.state import load_hooks, load_optimizer, load_values, load_weights, save_state


def run(job: Job) -> None:
    """Train as one rank and leave the model in `job.out`; see `training.run`."""
    distributed.start()
    with StopRequest(job.execution.get("time_limit_s")) as stop:
        Loop(job).train(stop)


class Loop:
    """The state of one training, as hooks see it.

    Attributes:
        job, settings, hooks: what is trained, the recipe's settings, and its hooks.
        model: sharded when there are several ranks; parameters bear Hugging Face names.
        applied, context: the transforms, and their faults' bookkeeping.
        clip: keeps weights in range; called after each optimizer step.
        optimizer: a hook may replace it (after a merge, for example).
        parameters: of the model and its transform, before a hook changed either.
        kept: what a micro-batch keeps in memory for its backward pass, once it is known.
        scale: of the loss, where the precision is fp16.
        step: optimizer steps done.
        loss: mean loss of the last step, nats per target; known on every rank.
        figures: what hooks add to the next line of the log; a step with a `valid_loss` has one.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        recipe = recipe_of(job)
        self.settings: Any = recipe.Settings(**job.settings["recipe"], **job.execution.get("recipe", {}))
        self.hooks = recipe.hooks(self.settings, job)
        self.seed: int = job.settings["seed"]
        self.device = distributed.device()
        self.sharing = Sharing.of(self.settings.global_batch, job.execution, distributed.rank(), distributed.world())
        self.loader: Any = self.hooks.loader() or self._shards()
        self.model: Any = initial_model(job)
        self.hooks.adapt(self.model)
        self.applied = apply_transform(job, self.model)
        self.context, self.transform_report = self.applied.context, self.applied.report
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.hooks.prepare(self)
        self._place()
        self.clip = WeightClipping(self.model, self.settings.clip_weights)
        self.optimizer = self.hooks.optimizer(self.model.parameters())
        self.scale = LossScale(self.settings.precision == "fp16")
        self.checkpoints = job.work / "checkpoints"
        self.kept: Activations | None = None
        self.step, self.loss, self.tokens, self.tail = 0, math.nan, 0, Tail(self.settings.steps)
        self.figures: dict[str, float] = {}
        self._resume()

    def _shards(self) -> BatchLoader:
        shards = TokenShards(self.job.inputs["tokens"], getattr(self.settings, "split", "train"))
        return BatchLoader(shards, self.settings.seq_len, self.settings.global_batch, self.seed)

    def _place(self) -> None:
        """Recompute, compile, move and shard the model, in this order."""
        save_memory(self.model, option(self.job, "activation_checkpointing", "none"))
        self.model.train()
        if option(self.job, "compile", False):
            for block in blocks(self.model):
                block.compile()
        self.model.to(self.device)
        if distributed.world() > 1:
            shard(self.model, self.device)

    def train(self, stop: StopRequest) -> None:
        """Train to the end of the budget and publish.

        Raises:
            Stopped: asked to stop; saved.
        """
        log = self._log() if distributed.rank() == 0 else None
        started, first_step = time.monotonic(), self.step
        try:
            self._steps(stop, log)
        except BaseException:
            if log:
                log.close(finished=False)
            raise
        more = self.hooks.result(self)
        state = self.hooks.whole(self)
        if log:
            seconds = time.monotonic() - started
            result = {
                "steps": self.step,
                "tokens": self.tokens,
                "parameters": self.parameters,
                "final_train_loss": self.tail.mean(self.step),
                "transform_report": self.transform_report,
                **more,
            }
            state = self.hooks.export(self.model, state, self.job.out)
            timing = {"seconds": seconds, "steps_in_this_process": self.step - first_step}
            publish(self.job, state, result, timing)
            log.close()
        distributed.barrier()

    def _steps(self, stop: StopRequest, log: MetricsLog | None) -> None:
        log_every, save_every = option(self.job, "log_every", 10), option(self.job, "checkpoint_every", 500)
        last_time, last_tokens = time.monotonic(), self.tokens
        while self.hooks.progress(self.step) < 1:
            rate, norm = self._optimizer_step()
            done = self.hooks.progress(self.step) >= 1
            if self.step % log_every == 0 or done or "valid_loss" in self.figures:
                now = time.monotonic()
                figures = {"loss": self.loss, "lr": rate, "grad_norm": norm, "tokens": self.tokens}
                speed = (self.tokens - last_tokens) / max(now - last_time, 1e-9)
                last_time, last_tokens = now, self.tokens
                figures |= self.figures
                self.figures = {}
                if log:
                    log.log(self.step, **figures, tokens_per_s=speed, **self._memory())
            stopping = stop.agreed() and not done
            if done or stopping or self.step % save_every == 0:
                self.save()
            if stopping:
                raise Stopped(f"stopped after step {self.step}")

    def _optimizer_step(self) -> tuple[float, float]:
        """One optimizer step; (learning rate, norm of the gradient before it was scaled down)."""
        step, hooks = self.step, self.hooks
        batches = [(first, self.to_device(batch)) for first, batch in hooks.read(self, step)]
        batches = hooks.select(self, step, batches)
        targets = distributed.total([sum(hooks.targets(batch) for _, batch in batches)])[0]
        rate = self.settings.lr * hooks.lr_factor(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        summed = torch.zeros((), dtype=torch.float64, device=self.device)
        for number, (first, batch) in enumerate(batches):
            self._sync_gradients(number == len(batches) - 1)
            torch.manual_seed(micro_seed(self.seed, step, first))
            self.context.begin(step, first)
            hooks.begin(step, first)
            loss_B = self._forward(batch)
            summed += loss_B.detach().sum()
            hooks.backward(self, loss_B.sum() * self.scale.value / max(targets, 1))
        norm = gradient_norm(self.model, self.settings.max_norm, self.scale.value)
        self.loss = distributed.total([float(summed)])[0] / max(targets, 1)
        take = self.scale.update(norm)
        if not math.isfinite(self.loss) or (take and not math.isfinite(norm)) or self.scale.exhausted:
            raise not_finite(step, self.loss, norm)  # all are global: all ranks agree
        if take:
            self.optimizer.step()
            self.clip()
        self.applied.settle()
        self.step += 1
        self.tokens += self.settings.tokens_per_step
        self.tail.add(self.step, self.loss)
        hooks.after_step(self, self.step)
        return rate, norm

    def _forward(self, batch: Batch) -> Tensor:
        """loss_B of a micro-batch; the first shows what that keeps in memory, where one device has all."""

        def forward() -> Tensor:
            with autocast(self.device, self.settings.precision):
                return self.hooks.loss(self.model, batch)

        if self.kept is not None or distributed.world() > 1 or option(self.job, "compile", False):
            return forward()
        loss_B, self.kept = activations(self.model, forward, self.sharing.accumulation > 1)
        return loss_B

    def _memory(self) -> dict[str, float]:
        """The account of this rank's memory, without activations where they were not seen, and the process's peak."""
        account = state_account(self.model, self.hooks.host_memory())
        if self.kept is None:
            return {k: v for k, v in account.figures().items() if k != "mem_activations_mib"} | peak_memory()
        account = replace(account, activations=self.kept.total())
        stated = account.total(accumulates=self.sharing.accumulation > 1) / MIB
        return {**account.figures(), "mem_stated_mib": round(stated, 3), **peak_memory()}

    def to_device(self, batch: Batch) -> Batch:
        """The batch on this rank's device."""
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}

    def _sync_gradients(self, last: bool) -> None:
        """Reduce gradients over ranks with the step's last micro-batch only."""
        if distributed.world() > 1:
            self.model.set_requires_gradient_sync(last)

    def save(self) -> None:
        """Write, seal and prune checkpoints; all ranks call it."""
        directory = self.checkpoints / checkpoint_name(self.step)
        tensors, values = self.hooks.state()
        own = {"step": self.step, "tokens": self.tokens, "tail": self.tail.losses, "hooks": values}
        own["loss_scale"] = self.scale.state()
        save_state(directory, self.model, self.optimizer, {**own, "fingerprint": self.job.fingerprint}, tensors)
        self.hooks.save(directory)
        distributed.barrier()  # every rank has written its part: now the seal commits them all
        if distributed.rank() == 0:
            seal(directory)
            prune(self.checkpoints, option(self.job, "keep_checkpoints", 3))
        distributed.barrier()

    def _resume(self) -> None:
        found = agreed_newest(self.checkpoints)
        if found is None:
            return
        values = resumable(found, self.job)
        load_weights(found, self.model)
        load_optimizer(found, self.model, self.optimizer)
        self.hooks.load(load_hooks(found), values["hooks"])
        self.hooks.restore(self, found)
        self.scale.load(values["loss_scale"])
        self.step, self.tokens = values["step"], values["tokens"]
        self.tail = Tail(self.settings.steps, values["tail"])

    def _log(self) -> MetricsLog:
        out, work = self.job.out / "log" / "metrics.jsonl", self.job.work / "metrics.jsonl"
        return MetricsLog(out, work, self.job, self.settings.steps, self.step)


def resumable(directory: Path, job: Job) -> dict[str, Any]:
    """The values of a good checkpoint, after making sure that it is of this training; says that it is used.

    Raises:
        UserError: the work dir belongs to another training; a fresh start would destroy it.
    """
    values = load_values(directory)
    if values["fingerprint"] != job.fingerprint:
        raise UserError(
            "the checkpoint is of another training",
            where=str(directory),
            value=values["fingerprint"][:12],
            allowed=job.fingerprint[:12],
            fix="remove the work directory",
        )
    return values


def shard(model: nn.Module, device: torch.device) -> None:
    """Shard parameters, gradients and optimizer state over all ranks, in place (FSDP2); gradients are summed."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    mesh = init_device_mesh(device.type, (distributed.world(),))
    for part in [*blocks(model), model]:
        fully_shard(part, mesh=mesh)
    for part in model.modules():
        if isinstance(part, FSDPModule):
            # The loss is divided by the targets of all ranks already. Gloo has no scaled sum, so sum plainly.
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
