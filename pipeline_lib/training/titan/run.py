"""Pretraining with torchtitan: from a job to weights under Hugging Face names."""

from __future__ import annotations

import contextlib
import gc
import os
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from pipeline_lib.artifacts.files import read_json
from pipeline_lib.artifacts.job import Job
from pipeline_lib.config.errors import UserError
from pipeline_lib.training import distributed
from pipeline_lib.training.signals import StopRequest
from pipeline_lib.training.titan.plan import Plan

if TYPE_CHECKING:
    from pipeline_lib.training.titan.trainer import TitanTrainer


def run(job: Job) -> None:
    """Train as this process's rank and leave the weights in `job.out` (rank 0).

    Written are model.safetensors (fp32, canonical names), transform.json and transform.safetensors, train.json,
    log/metrics.jsonl and check.safetensors: logits of the trained model on fixed tokens, without faults, for
    the conversion to compare with.

    Raises:
        Stopped: asked to stop; the state is saved in `job.work`.
        UserError: the settings fit neither the data nor the ranks, or the training diverged.
    """
    from pipeline_lib.training.titan.device import prepare, set_threads

    device_type = prepare()
    threads = set_threads()
    with _ranks(job, device_type) as plan, _quiet():
        try:
            _check_tokens(plan)
            _train(plan)
        finally:
            torch.set_num_threads(threads)
            gc.enable()  # torchtitan switches it off and collects at set steps, alike on all ranks


def _train(plan: Plan) -> None:
    from pipeline_lib.training.build import start_calibrated
    from pipeline_lib.training.metrics import MetricsLog
    from pipeline_lib.training.titan.trainer import TitanTrainer

    job = plan.job
    job.work.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with StopRequest(plan.option("time_limit_s", None)) as stop:
        trainer = TitanTrainer(plan)
        if "init" in job.inputs:
            trainer.start_from(job.inputs["init"])
        trainer.clip()
        trainer.applied.prepare()
        start_calibrated(job, trainer.applied)
        trainer.resume()
        log, files = None, (job.out / "log" / "metrics.jsonl", job.work / "metrics.jsonl")
        if plan.first:
            log = MetricsLog(*files, job, plan.steps, trainer.step)
        done = False
        try:
            trainer.train_on(stop, log)
            done = True
        finally:
            if log is not None:
                log.close(finished=done)
    _finish(plan, trainer, time.monotonic() - start)


def _finish(plan: Plan, trainer: TitanTrainer, seconds: float) -> None:
    from safetensors.torch import save_file

    from pipeline_lib.models.naming import split_transform
    from pipeline_lib.training.outcome import CHECK, publish
    from pipeline_lib.training.titan.export import reference_logits, whole_state

    state = whole_state(trainer)
    if plan.first:
        result = {
            "steps": plan.steps,
            "tokens": plan.steps * plan.recipe.tokens_per_step,
            "parameters": sum(tensor.numel() for tensor in split_transform(state)[0].values()),
            "final_train_loss": trainer.tail.mean(),
            "transform_report": trainer.applied.report,
        }
        provenance = {
            "seconds": seconds,
            "processes": plan.sharing.world,
            "micro_batch": plan.sharing.micro_batch,
            "device": torch.cuda.get_device_name() if trainer.device.type == "cuda" else "CPU",
        }
        publish(plan.job, state, result, provenance)
        save_file(reference_logits(plan, state), plan.job.out / CHECK)
    distributed.barrier()


def _check_tokens(plan: Plan) -> None:
    """The model must know every token of the data."""
    vocab = read_json(Path(plan.job.inputs["tokens"]) / "tokens.json")["result"]["vocab_size"]
    if vocab > plan.model["vocab"]:
        raise UserError(
            "the data has more token types than the model's vocabulary",
            where=f"{plan.job.label}: model.vocab",
            value=plan.model["vocab"],
            allowed=f"at least {vocab}",
            fix="use the tokenizer's vocabulary size",
        )


@contextlib.contextmanager
def _ranks(job: Job, device_type: str) -> Iterator[Plan]:
    """The plan of this rank, with the process group it needs and torchtitan's environment variable."""
    distributed.start()
    plan = Plan.of(job, distributed.rank(), distributed.world())
    alone = plan.sharded and not dist.is_initialized()
    if alone:  # FSDP2 wants a process group for one rank too; it needs no port
        backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    before = os.environ.get("LOCAL_RANK")
    os.environ.setdefault("LOCAL_RANK", "0")
    try:
        yield plan
    finally:
        if before is None:
            del os.environ["LOCAL_RANK"]
        if alone:
            dist.destroy_process_group()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings that torchtitan's set-up causes on a CPU by design."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "In CPU autocast, but the target dtype is not supported")
        warnings.filterwarnings("ignore", "DTensor random operators may not have complete support")
        yield
