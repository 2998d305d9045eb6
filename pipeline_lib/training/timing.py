"""How long a machine takes for the passes of a training: forward and backward, forward alone, curvature; by depth.

Figures differ from run to run, so they stand in the artifact's provenance; `result` says what was measured.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline_lib.artifacts.files import write_json
from pipeline_lib.artifacts.job import Job
from pipeline_lib.artifacts.progress import Progress, say
from pipeline_lib.models.blocks import blocks, only
from pipeline_lib.training import distributed
from pipeline_lib.training.budget import flop_rate, flops
from pipeline_lib.training.build import apply_transform, autocast, initial_model, save_memory
from pipeline_lib.training.curvature import sampled
from pipeline_lib.training.flops import forward_parts
from pipeline_lib.training.hooks import Batch
from pipeline_lib.training.losses import IGNORED
from pipeline_lib.training.masking import TextHooks, logits_at
from pipeline_lib.training.settings import option

REPEATS, LEAST_REPEATS, SECONDS = 15, 2, 35.0
"""Of each pass, after one that warms up; fewer when all passes together would take longer than SECONDS."""
MOST_SEQUENCES = 128
KINDS = ("train", "forward", "hessian")


def measure(job: Job) -> None:
    """Leave timing.json: seconds a sequence of each kind of pass through 1 … all layers, on one device.

    On a slow machine fewer sequences are timed, and then fewer depths; what lies between these is on a straight line.
    """
    if option(job, "threads", 0):
        torch.set_num_threads(int(job.execution["threads"]))
    bench = Bench(job)
    depths = bench.fit(SECONDS)
    shapes = [(kind, layers) for layers in sorted(depths, reverse=True) for kind in KINDS]
    found: dict[str, dict[int, float]] = {kind: {} for kind in KINDS}
    spread: dict[str, dict[int, float]] = {kind: {} for kind in KINDS}
    end = time.monotonic() + SECONDS
    with Progress("timing", len(shapes), "passes") as progress:
        for number, (kind, layers) in enumerate(shapes):
            left = (end - time.monotonic()) / (len(shapes) - number)
            times = bench.times(kind, layers, left)
            found[kind][layers] = statistics.median(times) / bench.sequences
            spread[kind][layers] = (max(times) - min(times)) / statistics.median(times)
            progress.update()
    seconds = {kind: filled(found[kind], bench.depth) for kind in KINDS}
    speed = bench.reference_seconds() / seconds["train"][bench.depth]
    say(f"an hour of reference `flops` takes {1 / speed:.3g} h here, with the whole model on one device")
    measured = {"seconds": seconds, "spread": spread, "micro_batch": bench.sequences, "device": bench.device_name()}
    more = {"measured_depths": sorted(depths), "flops_reference_per_second": speed}
    result = {"kinds": list(KINDS), "layers": bench.depth}
    write_json(job.out / "timing.json", {"result": result, "provenance": {**measured, **more}})


def filled(seconds: dict[int, float], depth: int) -> dict[int, float]:
    """Seconds through 1 … depth layers: as measured, and on straight lines between."""
    known = sorted(seconds)
    whole = {}
    for layers in range(1, depth + 1):
        low = max(at for at in known if at <= layers)
        high = min(at for at in known if at >= layers)
        share = (layers - low) / (high - low) if high > low else 0.0
        whole[layers] = seconds[low] + share * (seconds[high] - seconds[low])
    return whole


class Bench:
    """A model of the job's shape on random text."""

    def __init__(self, job: Job) -> None:
        from pipeline_lib.training.run import recipe_of

        recipe = job.settings["recipe"]
        seeded = {**job.settings, "seed": 0}
        job = Job(job.stage, job.label, job.fingerprint, seeded, job.inputs, job.work, job.out, job.execution)
        self.settings: Any = recipe_of(job).Settings(**recipe, steps=1)
        self.device = distributed.device()
        self.model: Any = initial_model(job)
        self.context = apply_transform(job, self.model).context
        self.hooks = TextHooks(self.settings, job)
        self.hooks.prepare(SimpleNamespace(model=self.model))  # type: ignore[arg-type]
        self.depth = len(blocks(self.model))
        self.sequences = min(option(job, "micro_batch", MOST_SEQUENCES), self.settings.global_batch)
        self.share = self.settings.mask_rate if hasattr(self.model, "masked_logits") else 1.0
        save_memory(self.model, option(job, "activation_checkpointing", "none"))
        self.model.train().to(self.device)
        self.optimizer = self.hooks.optimizer(self.model.parameters())
        self.batch = self._text()

    def fit(self, limit: float) -> list[int]:
        """Depths to time so that all passes together take about `limit` seconds; sets `sequences`, too."""
        most, every = self.sequences, list(range(1, self.depth + 1))
        self.sequences, self.batch = 1, {name: tensor[:1] for name, tensor in self.batch.items()}
        self._train()
        one = self._timed(self._train)
        self.optimizer.zero_grad(set_to_none=True)
        passes = len(KINDS) * (1 + LEAST_REPEATS) * self.depth
        self.sequences = max(1, min(most, int(limit / (passes * one))))
        self.batch = self._text()
        return every if passes * one <= limit else sorted({1, (self.depth + 1) // 2, self.depth})

    def _text(self) -> Batch:
        generator = torch.Generator().manual_seed(0)
        shape = (self.sequences, self.settings.seq_len)
        text_BT = torch.randint(self.model.config.vocab_size, shape, generator=generator)
        batch = {"input_ids": text_BT, "labels": text_BT.roll(-1, 1)}
        if self.hooks.encoder:
            batch = self.hooks._hidden(text_BT, list(range(self.sequences)))
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def times(self, kind: str, layers: int, limit: float) -> list[float]:
        """Seconds of passes over `sequences` sequences, the share of the optimizer's step in them; at least two.

        Args:
            limit: seconds for all of them, roughly.
        """
        passes: dict[str, Callable[[], None]] = {
            "train": self._train, "forward": self._forward, "hessian": self._hessian
        }  # fmt: skip
        found: list[float] = []
        with only(self.model, range(layers)):
            warm_up = self._timed(passes[kind])
            while len(found) < LEAST_REPEATS or (len(found) < REPEATS and warm_up + sum(found) + found[-1] < limit):
                found.append(self._timed(passes[kind]))
            if kind == "train":
                self._timed(self.optimizer.step)  # makes its state
                step = self._timed(self.optimizer.step) * self.sequences / self.settings.global_batch
                found = [seconds + step for seconds in found]
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.state.clear()
        return found

    def _timed(self, action: Callable[[], Any]) -> float:
        self._wait()
        start = time.perf_counter()
        action()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _loss(self, batch: Batch) -> Tensor:
        self.context.begin(0, 0)
        with autocast(self.device, self.settings.precision):
            return self.hooks.loss(self.model, batch)

    def _train(self) -> None:
        self._loss(self.batch).sum().backward()

    @torch.no_grad()
    def _forward(self) -> None:
        self._loss(self.batch)

    def _hessian(self) -> None:
        """The gradient of the loss on labels that the model draws (Liu et al., 2023, arXiv 2305.14342, algorithm 2)."""
        at_BT = self.batch["labels"] != IGNORED
        self.context.begin(0, 0)
        with autocast(self.device, self.settings.precision):
            logits_NV = logits_at(self.model, self.batch["input_ids"], at_BT, self.hooks.encoder).float()
        labels_N = sampled(logits_NV.detach(), torch.rand(len(logits_NV), device=self.device))
        F.cross_entropy(logits_NV, labels_N).backward()

    def reference_seconds(self) -> float:
        """Of a training pass of one sequence, by FLOPs at the reference's rate."""
        price = flops(*forward_parts(self.model, self.settings.seq_len, self.share))
        return price("train", self.depth, 1) / flop_rate()

    def device_name(self) -> str:
        """The device that was timed."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
