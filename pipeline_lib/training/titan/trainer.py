"""torchtitan's trainer with our data, faults, schedule, checkpoints and metrics."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import torch
from torch import nn
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.utils import clip_grad_norm_
from torchtitan.train import Trainer

from pipeline_lib.config.errors import Stopped, UserError
from pipeline_lib.models.checkpoint import checkpoint_directory, load_state
from pipeline_lib.models.naming import canonical_titan, is_transform_state
from pipeline_lib.training import distributed
from pipeline_lib.training.checkpoints import agreed_newest, checkpoint_name, prune
from pipeline_lib.training.clipping import WeightClipping
from pipeline_lib.training.memory import peak_memory
from pipeline_lib.training.metrics import MetricsLog
from pipeline_lib.training.outcome import Tail
from pipeline_lib.training.schedules import lr_factor
from pipeline_lib.training.signals import StopRequest
from pipeline_lib.training.titan import state
from pipeline_lib.training.titan.device import peak_flops
from pipeline_lib.training.titan.model import assign
from pipeline_lib.training.titan.plan import Plan
from pipeline_lib.training.titan.spec import GlobalBatches, job_config, register
from pipeline_lib.transforms.apply import Applied, apply

_FINE = torch.iinfo(torch.int64).max


class TitanTrainer(Trainer):
    """Builds model, optimizer and schedule as torchtitan does; the loop over steps is ours.

    Attributes:
        applied: the transforms on the model: fault context and report.
        clip: keeps weights in range; called after each optimizer step.
        tail: losses of the last steps, for the training's final loss.
    """

    applied: Applied
    dataloader: GlobalBatches

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        super().__init__(job_config(plan, register(plan, self._transform)))
        # torchtitan would wrap a single rank in autocast; here FSDP2 casts, or nothing does (Plan.sharded).
        self.maybe_enable_amp = contextlib.nullcontext()
        self.tail = Tail(plan.steps)
        self.clip = WeightClipping(self.model_parts[0], plan.recipe.clip_weights, canonical_titan)
        self._parameters = [parameter for part in self.model_parts for parameter in part.parameters()]
        self._loss = torch.zeros((), device=self.device)
        self._grad_norm = torch.zeros((), device=self.device)
        self._bad_step = torch.full((), _FINE, dtype=torch.int64, device=self.device)

    def init_distributed(self) -> ParallelDims:
        """All ranks shard the weights (FSDP); torchtitan's replication would average what is already a mean."""
        world = self.plan.sharing.world
        return ParallelDims(dp_replicate=1, dp_shard=-1, cp=1, tp=1, pp=1, ep=1, etp=1, world_size=world)

    def _transform(self, model: nn.Module) -> None:
        job, recipe = self.plan.job, self.plan.recipe
        self.applied = apply(
            model,
            job.settings["transform"],
            seed=self.plan.seed,
            canonical=canonical_titan,
            global_batch=recipe.global_batch,
            fault_devices=recipe.fault_devices,
        )

    def train_step(self, step: int) -> torch.Tensor:  # type: ignore[override]
        """One optimizer step, counted from 0. Returns this rank's share of the mean loss over the global batch."""
        recipe = self.plan.recipe
        self.optimizers.zero_grad()
        loss = torch.zeros((), device=self.device)
        for first, inputs_BT, labels_BT in self.dataloader.micro_batches(step):
            self.applied.context.begin(step, first)
            # The denominator is that of the whole step, so gradients sum to those of one big batch.
            loss += self.forward_backward_step(
                input_dict={"input": inputs_BT.to(self.device)},
                labels=labels_BT.to(self.device),
                global_valid_tokens=recipe.tokens_per_step,  # type: ignore[arg-type]
            ).detach()
        self._grad_norm = clip_grad_norm_(self._parameters, recipe.max_norm, foreach=True)
        self.optimizers.step()
        self.clip()
        self.applied.settle()
        self.lr_schedulers.step()
        fine = torch.isfinite(loss) & torch.isfinite(self._grad_norm)
        self._bad_step = torch.where(fine, self._bad_step, self._bad_step.clamp(max=step))
        return loss

    def start_from(self, checkpoint: Path) -> None:
        """Take the initial weights from a Hugging Face checkpoint of the same architecture.

        Raises:
            UserError: it is of another architecture.
        """
        given = load_state(checkpoint_directory(checkpoint))
        own = {canonical_titan(name): value for name, value in self.model_parts[0].named_parameters()}
        own = {name: value for name, value in own.items() if not is_transform_state(name)}
        wrong = {name for name in {*own, *given} if name not in given or name not in own}
        wrong |= {name for name in own.keys() & given.keys() if own[name].shape != given[name].shape}
        if wrong:
            raise UserError(
                "the weights to start from do not fit the model",
                where=f"{self.plan.job.label}: from",
                value=sorted(wrong)[:5],
                allowed="an experiment with the same model",
                fix="use the same model in both experiments",
            )
        for name, parameter in own.items():
            assign(parameter, given[name].float())

    def resume(self) -> None:
        """Go on from the newest good checkpoint of this training, if there is one."""
        found = agreed_newest(self.plan.checkpoints)
        if found is not None:
            position = state.load(self, found, self.plan.job.fingerprint)
            self.step, self.tail = position["step"], Tail(self.plan.steps, position["tail"])

    def train_on(self, stop: StopRequest, log: MetricsLog | None) -> None:
        """Train from the current step to the last, with checkpoints and metrics on the way.

        Raises:
            Stopped: asked to stop; the state is saved.
            UserError: the loss or its gradient is no longer finite.
        """
        plan = self.plan
        every, log_every = int(plan.option("checkpoint_every", 500)), int(plan.option("log_every", 10))
        # Asking the other ranks waits for the GPU; steps there are short enough to ask now and then.
        ask_every = 1 if self.device.type == "cpu" else 5
        clock = _Clock(self)
        while self.step < plan.steps:
            loss = self.train_step(self.step)
            self.step += 1
            self.gc_handler.run(self.step)
            self._loss += loss
            if self.step > self.tail.first:
                self.tail.add(self.step, distributed.total([loss.item()])[0])
            last = self.step == plan.steps
            halt = not last and self.step % ask_every == 0 and stop.agreed()
            keep = last or halt or self.step % every == 0
            tell = last or self.step == 1 or self.step % log_every == 0
            if keep or tell:
                self._check()
            if tell:
                figures = clock.figures(self._loss)
                self._loss.zero_()
                if log is not None:
                    log.log(self.step, **figures)
            if keep:
                self._save()
            if halt:
                raise Stopped(f"{plan.job.label}: stopped after step {self.step} of {plan.steps}, state saved")

    def _save(self) -> None:
        plan = self.plan
        position = {"step": self.step, "fingerprint": plan.job.fingerprint, "tail": self.tail.losses}
        state.save(self, plan.checkpoints / checkpoint_name(self.step), position)
        if plan.first:
            prune(plan.checkpoints, int(plan.option("keep_checkpoints", 3)))

    def _check(self) -> None:
        """End the training, on all ranks, when a loss or a gradient norm since the last check was not finite."""
        first = self._bad_step.item()
        if distributed.total([float(first != _FINE)])[0] == 0:
            return
        found = sorted(path.name for path in self.plan.checkpoints.glob("step-*"))
        recipe = self.plan.recipe
        step = int(first) + 1 if first != _FINE else self.step  # another rank may know it better
        raise UserError(
            f"the training diverged: loss or gradient is not finite in step {step} of {self.plan.steps}",
            where=self.plan.job.label,
            value={"lr": recipe.lr, "max_norm": recipe.max_norm, "precision": recipe.precision},
            fix=f"lower recipe.lr or the transform's fault probability (or zero out large values), lengthen the "
            f"warm-up, or use precision fp32; the last checkpoint is {found[-1] if found else 'none'}",
        )


class _Clock:
    """Figures of the steps since the last time it was asked."""

    def __init__(self, trainer: TitanTrainer) -> None:
        self.trainer, self.step, self.time = trainer, trainer.step, time.perf_counter()
        self.peak = peak_flops(trainer.device)

    def figures(self, loss: torch.Tensor) -> dict[str, float]:
        """Loss is the mean over steps and ranks; all ranks must ask together."""
        trainer = self.trainer
        mean = distributed.total([loss.item()])[0] / (trainer.step - self.step)
        now = time.perf_counter()  # after .item(): the GPU has finished the steps
        plan, recipe = trainer.plan, trainer.plan.recipe
        tokens_per_step = recipe.tokens_per_step
        rate = tokens_per_step * (trainer.step - self.step) / (now - self.time)
        self.step, self.time = trainer.step, now
        done = trainer.step - 1
        figures: dict[str, float] = {
            "loss": mean,
            "grad_norm": trainer._grad_norm.item(),
            "lr": recipe.lr * lr_factor(done, plan.steps, plan.warmup_steps, recipe.decay, recipe.min_lr_factor),
            "tokens": trainer.step * tokens_per_step,
            "tokens_per_s": rate,
            **peak_memory(),
        }
        if self.peak:
            flops = trainer.metrics_processor.num_flops_per_token * rate
            figures["mfu"] = flops / (self.peak * plan.sharing.world)
        return figures
