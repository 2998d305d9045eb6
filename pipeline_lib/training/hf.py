"""The engine `hf`: the transformers Trainer, fed in our order and resumed from our checkpoints.

The Trainer keeps its loop, accumulation and data parallelism. Errata brings the batches (position = step),
the loss per example, the faults' bookkeeping, sealed checkpoints of safetensors and JSON in place of the
Trainer's pickles, signals and metrics.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from pipeline_lib.artifacts.job import Job
from pipeline_lib.artifacts.progress import say
from pipeline_lib.config.errors import Stopped
from pipeline_lib.data.tokens import BatchLoader, TokenShards
from pipeline_lib.models.blocks import blocks
from pipeline_lib.training import distributed
from pipeline_lib.training.batching import Sharing, micro_seed
from pipeline_lib.training.build import apply_transform, autocast, initial_model, save_memory
from pipeline_lib.training.checkpoints import agreed_newest, checkpoint_name, prune, seal
from pipeline_lib.training.clipping import WeightClipping
from pipeline_lib.training.gradients import gradient_norm, not_finite
from pipeline_lib.training.hooks import Hooks, refuse_loop_hooks
from pipeline_lib.training.loop import resumable
from pipeline_lib.training.losses import count_targets
from pipeline_lib.training.memory import peak_memory
from pipeline_lib.training.metrics import MetricsLog
from pipeline_lib.training.outcome import Tail, divergence, publish
from pipeline_lib.training.run import recipe_of
from pipeline_lib.training.settings import option
from pipeline_lib.training.signals import StopRequest
from pipeline_lib.training.state import full_state, load_optimizer, load_weights, save_state


def run(job: Job) -> None:
    """Train as one rank and leave the model in `job.out`; see `training.run`."""
    distributed.start()
    with StopRequest(job.execution.get("time_limit_s")) as stop:
        trainer = ErrataTrainer(job)
        found = agreed_newest(trainer.checkpoints)
        watch = _Watch(trainer, stop)
        trainer.add_callback(watch)
        try:
            trainer.resume(found)
            watch.start()
            if trainer.done_steps < trainer.recipe.steps:
                trainer.train_on(found)
            if watch.stopped:
                raise Stopped(f"stopped after step {trainer.done_steps}")
        except BaseException:
            watch.close(finished=False)
            raise
        state = full_state(trainer.model)  # type: ignore[arg-type]  # the Trainer holds no FSDP or None here
        if distributed.rank() == 0:
            trainer.publish(state, watch.seconds)
        watch.close(finished=True)
        distributed.barrier()


class ErrataTrainer(Trainer):
    """The Trainer with Errata's batches, loss, optimizer and checkpoints.

    Attributes:
        done_steps: optimizer steps done.
        parameters: those of the model itself, without adapters and without what a transform added.
        last_loss: mean loss of the last step over all ranks, nats per target.
        first_loss: that of the first step.
        keeps: the recipe keeps the weights of a training that diverges.
        kept: this one's loss or gradient were not finite, and it ended there.
    """

    def __init__(self, job: Job) -> None:
        recipe = recipe_of(job)
        self.job, self.recipe = job, recipe.Settings(**job.settings["recipe"])
        self.hooks: Hooks = recipe.hooks(self.recipe, job)
        refuse_loop_hooks(self.hooks, self.recipe.type)
        self.sharing = Sharing.of(self.recipe.global_batch, job.execution, distributed.rank(), distributed.world())
        shards = TokenShards(job.inputs["tokens"], "train")
        self.batches = BatchLoader(shards, self.recipe.seq_len, self.recipe.global_batch, job.settings["seed"])
        model: Any = initial_model(job)
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.hooks.adapt(model)
        self.applied = apply_transform(job, model)
        self.context = self.applied.context
        save_memory(model, option(job, "activation_checkpointing", "none"))
        if option(job, "compile", False):
            for block in blocks(model):
                block.compile()
        model.to(distributed.device())
        self.clip = WeightClipping(model, self.recipe.clip_weights)
        optimizer = self.hooks.optimizer(model.parameters())
        schedule = LambdaLR(optimizer, self.hooks.lr_factor)
        self.done_steps, self.last_loss, self.tail = 0, math.nan, Tail(self.recipe.steps)
        self.first_loss, self.kept = math.nan, False
        self.keeps = getattr(self.recipe, "on_divergence", "stop") == "keep"
        self._summed: Tensor | float = 0.0
        self._targets = 1.0
        self.checkpoints = job.work / "checkpoints"
        super().__init__(model, self._arguments(), optimizers=(optimizer, schedule))
        self.loss_is_scaled_for_ga = True  # `compute_loss` divides by the targets of the whole step
        self.remove_callback(PrinterCallback)

    def _arguments(self) -> TrainingArguments:
        recipe = self.recipe
        on_cpu = not torch.cuda.is_available()
        arguments = TrainingArguments(
            output_dir=str(self.job.work / "trainer"),
            max_steps=recipe.steps,
            per_device_train_batch_size=self.sharing.micro_batch,
            gradient_accumulation_steps=self.sharing.accumulation,
            max_grad_norm=0.0,  # `_Watch` scales gradients down, as the engine `loop` does, and sees their norm
            seed=self.job.settings["seed"],
            ignore_data_skip=True,  # our loader starts at the resumed step by itself
            save_strategy="no",
            eval_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_nan_inf_filter=False,
            ddp_find_unused_parameters=False,
            ddp_backend="gloo" if on_cpu and distributed.world() > 1 else None,
            use_cpu=on_cpu,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        )
        # One process is one device, however many GPUs are in sight: the Trainer would replicate in threads.
        arguments._n_gpu = min(arguments.n_gpu, 1)
        return arguments

    def train_on(self, found: Path | None) -> None:
        """Train from the checkpoint `resume` took, or from the beginning, to the end or to where it is kept."""
        try:
            self.train(resume_from_checkpoint=None if found is None else str(found))
        except _Kept as end:
            say(f"{self.job.label}: {end}; on_divergence is keep: its weights are kept as they are, marked as diverged")
            self.kept = True

    def get_train_dataloader(self) -> Any:
        """This rank's micro-batches from the first step that is not done yet, endlessly."""
        return _MicroBatches(self)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The micro-batch's share of the mean loss of the step, under the faults of its place in the training."""
        step, first, targets = inputs.pop("step"), inputs.pop("first_sequence"), inputs.pop("targets")
        torch.manual_seed(micro_seed(self.job.settings["seed"], step, first))
        self.context.begin(step, first)
        with autocast(self.args.device, self.recipe.precision):
            loss_B = self.hooks.loss(model, inputs)
        self._summed = self._summed + loss_B.detach().double().sum()  # on the device: no wait for each micro-batch
        self._targets = targets
        # Data parallelism averages gradients over ranks; the targets are those of all ranks.
        return loss_B.sum() * (distributed.world() / max(targets, 1))

    def reduce_loss(self) -> None:
        """Make `last_loss` the mean loss of the step whose micro-batches are all done; all ranks call it."""
        self.last_loss = distributed.total([float(self._summed)])[0] / max(self._targets, 1)
        self._summed = 0.0
        if self.done_steps == 0:
            self.first_loss = self.last_loss

    def save(self) -> None:
        """Write, seal and prune checkpoints; all ranks call it."""
        directory = self.checkpoints / checkpoint_name(self.done_steps)
        values = {"step": self.done_steps, "tail": self.tail.losses, "fingerprint": self.job.fingerprint}
        if self.keeps:
            values["first_loss"] = self.first_loss
        save_state(directory, self.model, _plain(self.optimizer), values)  # type: ignore[arg-type]
        if distributed.rank() == 0:
            self.state.save_to_json(str(directory / TRAINER_STATE_NAME))
            seal(directory)
            prune(self.checkpoints, option(self.job, "keep_checkpoints", 3))
        distributed.barrier()

    def resume(self, found: Path | None) -> None:
        """Take the position from a good checkpoint; the Trainer asks for weights and optimizer state itself."""
        if found is not None:
            values = resumable(found, self.job)
            self.done_steps, self.tail = values["step"], Tail(self.recipe.steps, values["tail"])
            self.first_loss = values.get("first_loss", math.nan)
            load_weights(found, self.model)  # type: ignore[arg-type]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_weights(Path(resume_from_checkpoint), self.model)  # type: ignore[arg-type]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        load_optimizer(Path(checkpoint), self.model, _plain(self.optimizer))  # type: ignore[arg-type]
        # The schedule is a function of the step: setting the step is resuming it.
        schedule: Any = self.lr_scheduler
        schedule.last_epoch = self.done_steps
        for group, base in zip(_plain(self.optimizer).param_groups, schedule.base_lrs, strict=True):
            group["lr"] = base * self.hooks.lr_factor(self.done_steps)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing to load: `compute_loss` sets torch's generator anew for every micro-batch."""

    def publish(self, state: dict[str, Tensor], seconds: float) -> None:
        """Write the artifact; rank 0 calls it."""
        model: Any = self.model
        result = {
            "steps": self.done_steps,
            "tokens": self.done_steps * self.recipe.tokens_per_step,
            "parameters": self.parameters,
            "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "final_train_loss": None if self.kept else self.tail.mean(),
            "transform_report": self.applied.report,
        }
        if self.keeps:
            final = math.nan if self.kept else self.tail.mean()
            result["diverged"] = divergence(self.done_steps, self.first_loss, final)
        self.applied.remove()
        state = self.hooks.export(model, state, self.job.out)
        publish(self.job, state, result, {"seconds": seconds})


class _Kept(Exception):
    """Loss or gradient are not finite, on all ranks alike, and the recipe keeps what there is."""


class _MicroBatches:
    """What the Trainer takes for a DataLoader without a length."""

    def __init__(self, trainer: ErrataTrainer) -> None:
        self.trainer = trainer

    def __iter__(self) -> Iterator[dict[str, Any]]:
        trainer, sharing = self.trainer, self.trainer.sharing
        for step in range(trainer.done_steps, trainer.recipe.steps):
            micro = [
                (first, trainer.hooks.batch(trainer.batches, step, first, sharing.micro_batch))
                for first in sharing.firsts()
            ]
            targets = distributed.total([sum(count_targets(batch["labels"]) for _, batch in micro)])[0]
            for first, batch in micro:
                yield {**batch, "step": step, "first_sequence": first, "targets": targets}


class _Watch(TrainerCallback):
    """Metrics, checkpoints and stopping at the end of each optimizer step."""

    def __init__(self, trainer: ErrataTrainer, stop: StopRequest) -> None:
        self.trainer, self.stop = trainer, stop
        self.stopped, self.log = False, None
        self.rate, self.norm = 0.0, math.nan
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        """Wall time since the training began in this process."""
        return time.monotonic() - self._began

    def start(self) -> None:
        """Open the log at the step the training goes on from."""
        trainer = self.trainer
        self._last_time, self._last_step = time.monotonic(), trainer.done_steps
        if distributed.rank() == 0:
            out, work = trainer.job.out / "log" / "metrics.jsonl", trainer.job.work / "metrics.jsonl"
            self.log = MetricsLog(out, work, trainer.job, trainer.recipe.steps, trainer.done_steps)

    def close(self, finished: bool) -> None:
        """Close the log."""
        if self.log is not None:
            self.log.close(finished)
            self.log = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Scale gradients down; note the figures of this step that are gone after it."""
        trainer = self.trainer
        self.rate = _plain(trainer.optimizer).param_groups[0]["lr"]
        self.norm = gradient_norm(trainer.model, trainer.recipe.max_norm)  # type: ignore[arg-type]
        trainer.reduce_loss()
        if not (math.isfinite(trainer.last_loss) and math.isfinite(self.norm)):
            error = not_finite(trainer.done_steps, trainer.last_loss, self.norm)
            raise _Kept(str(error).splitlines()[0]) if trainer.keeps else error

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep weights in range; transforms take over what they observed."""
        self.trainer.clip()
        self.trainer.applied.settle()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log, save, stop."""
        trainer, job = self.trainer, self.trainer.job
        trainer.done_steps += 1
        trainer.tail.add(trainer.done_steps, trainer.last_loss)
        step, done = trainer.done_steps, trainer.done_steps >= trainer.recipe.steps
        if step % option(job, "log_every", 10) == 0 or done:
            self._write(step)
        stopping = self.stop.agreed() and not done
        if done or stopping or step % option(job, "checkpoint_every", 500) == 0:
            trainer.save()
        if stopping:
            self.stopped = control.should_training_stop = True

    def _write(self, step: int) -> None:
        now = time.monotonic()
        per_step = self.trainer.recipe.tokens_per_step
        speed = (step - self._last_step) * per_step / max(now - self._last_time, 1e-9)
        self._last_time, self._last_step = now, step
        if self.log is not None:
            figures = {"loss": self.trainer.last_loss, "lr": self.rate, "grad_norm": self.norm}
            self.log.log(step, **figures, tokens=step * per_step, tokens_per_s=speed, **peak_memory())


def _plain(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)
