"""One training of the contest in `nano_training`: `python -m benchmarks.nano_contestants NAME FOLDER`.

FOLDER holds tokens/ and contest.json; the last line on stdout is {"tokens_per_s", "loss"}.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline_lib.artifacts.files import read_json
from pipeline_lib.artifacts.job import Job
from pipeline_lib.training.recipes.pretrain import Settings
from pipeline_lib.training.schedules import lr_factor


class Contest:
    """What all contestants are given.

    Attributes:
        stage: settings of the stage `train`.
        recipe: its recipe.
        skip: steps that are not counted.
        log_every: steps between readings of the loss.
    """

    def __init__(self, folder: Path) -> None:
        values = read_json(folder / "contest.json")
        self.folder, self.stage = folder, values["settings"]
        self.recipe = Settings(**self.stage["recipe"])
        self.skip, self.log_every = values["skip"], values["log_every"]
        self.steps = self.recipe.steps or 0

    def tokens_per_s(self, seconds: float) -> float:
        """From the seconds that the counted steps took."""
        return (self.steps - self.skip) * self.recipe.tokens_per_step / seconds

    def model(self) -> Any:
        """The model as transformers builds it, with the stage's initial weights."""
        from pipeline_lib.models import llama
        from pipeline_lib.models.initial import initial_weight

        model = llama.build(self.stage["model"])
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                shape = tuple(parameter.shape)
                parameter.copy_(initial_weight(name, shape, self.stage["model"]["dim"], self.stage["seed"]))
        return model

    def optimizer(self, model: Any) -> tuple[torch.optim.Optimizer, Any]:
        """Fused AdamW and the schedule of the recipe."""
        recipe = self.recipe
        optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=recipe.lr, betas=recipe.betas, eps=recipe.eps, weight_decay=recipe.weight_decay, fused=True,
        )  # fmt: skip
        factor = partial(
            lr_factor,
            steps=self.steps, warmup_steps=recipe.warmup_steps or 0,
            decay=recipe.decay, min_factor=recipe.min_lr_factor,
        )  # fmt: skip
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

    def sequences(self) -> tuple[Tensor, Tensor]:
        """Inputs and labels of all steps in order, int64 [steps · batch, T], in memory."""
        from pipeline_lib.data.tokens import BatchLoader, TokenShards

        recipe = self.recipe
        shards = TokenShards(self.folder / "tokens", "train")
        loader = BatchLoader(shards, recipe.seq_len, recipe.global_batch, self.stage["seed"])
        batches = [loader.batch(step, 0, recipe.global_batch) for step in range(self.steps)]
        inputs, labels = zip(*batches, strict=True)
        return torch.cat(inputs), torch.cat(labels)


def errata(contest: Contest, scratch: Path) -> tuple[float, float]:
    """Our training stage; times are those of its own log."""
    from pipeline_lib.training.run import run

    execution = {
        "processes": 1,
        "checkpoint_every": contest.steps,
        "log_every": contest.log_every,
        "tracking": {"wandb": "off"},
    }
    (scratch / "out").mkdir()
    inputs = {"tokens": contest.folder / "tokens"}
    run(Job("train", "nano", "0" * 64, contest.stage, inputs, scratch / "work", scratch / "out", execution))
    lines = [json.loads(line) for line in (scratch / "out/log/metrics.jsonl").read_text().splitlines()]
    at = {line["step"]: line for line in lines}
    return at[contest.steps]["seconds"] - at[contest.skip]["seconds"], at[contest.steps]["loss"]


def trainer(contest: Contest, scratch: Path) -> tuple[float, float]:
    """The Trainer on a dataset in memory, its loss from its own log."""
    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainerCallback, TrainingArguments

    recipe, (inputs, labels) = contest.recipe, contest.sequences()
    # `shift_labels` are labels that stand at their own place already.
    rows = [{"input_ids": x, "labels": y, "shift_labels": y} for x, y in zip(inputs, labels, strict=True)]
    seconds: dict[int, float] = {}

    class Clock(TrainerCallback):
        """Notes when steps end."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seconds[state.global_step] = time.perf_counter()

    class InOrder(Trainer):
        """Reads the sequences in the order they are in."""

        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return SequentialSampler(rows)

    arguments = TrainingArguments(
        output_dir=str(scratch),
        max_steps=contest.steps,
        per_device_train_batch_size=recipe.global_batch,
        max_grad_norm=recipe.max_norm or 0.0,
        logging_steps=contest.log_every,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    model = contest.model()
    made = InOrder(model, arguments, train_dataset=rows, optimizers=contest.optimizer(model), callbacks=[Clock()])  # type: ignore[arg-type]
    made.train()
    losses = [line["loss"] for line in made.state.log_history if "loss" in line]
    return seconds[contest.steps] - seconds[contest.skip], losses[-1]


def loop(contest: Contest, scratch: Path) -> tuple[float, float]:
    """What one would write by hand."""
    recipe, (inputs, labels) = contest.recipe, contest.sequences()
    model = contest.model()
    optimizer, schedule = contest.optimizer(model)
    start = summed = last = 0.0
    model.train()
    for step in range(contest.steps):
        rows = slice(step * recipe.global_batch, (step + 1) * recipe.global_batch)
        logits = model(input_ids=inputs[rows], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[rows].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_norm or float("inf"))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        summed += loss.detach()
        if (step + 1) % contest.log_every == 0:
            last, summed = float(summed) / contest.log_every, 0.0
        if step + 1 == contest.skip:
            start = time.perf_counter()
    return time.perf_counter() - start, last


CONTESTANTS = {"errata": errata, "transformers.Trainer": trainer, "hand-written loop": loop}


def main() -> None:
    """Run one and print its figures."""
    contest = Contest(Path(sys.argv[2]))
    with tempfile.TemporaryDirectory() as scratch:
        seconds, loss = CONTESTANTS[sys.argv[1]](contest, Path(scratch))
    print(json.dumps({"tokens_per_s": contest.tokens_per_s(seconds), "loss": loss}))


if __name__ == "__main__":
    main()
