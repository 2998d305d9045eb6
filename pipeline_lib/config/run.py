"""How stages run: the key `run` of config.yaml, of a model and of an experiment."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline_lib.config.base import Settings


class Run(Settings):
    """How stages run. Nothing here changes a result, so nothing here is fingerprinted."""

    gpus: int | None = Field(
        default=None, ge=0, description="GPUs a node for training; fewer are used where fewer are present"
    )
    nodes: int | None = Field(default=None, ge=1, description="nodes for training")
    cpu_processes: int | None = Field(default=None, ge=1, description="training processes on a machine without a GPU")
    micro_batch: int | None = Field(
        default=None, ge=1, description="sequences a rank a forward pass; the rest is accumulated"
    )
    threads: int | None = Field(default=None, ge=1, description="CPU threads of a stage")
    mem_mb: int | None = Field(default=None, ge=1, description="memory of a training job a node, MB")
    runtime_min: int | None = Field(
        default=None, ge=1, description="time limit of a training job, minutes; longer trainings go on in the next slot"
    )
    eval_mem_mb: int | None = Field(
        default=None, ge=1, description="memory of jobs that convert or evaluate a checkpoint, MB"
    )
    eval_runtime_min: int | None = Field(default=None, ge=1, description="time limit of those jobs, minutes")
    checkpoint_every: int | None = Field(default=None, ge=1, description="steps between checkpoints")
    keep_checkpoints: int | None = Field(default=None, ge=1, description="checkpoints kept while training")
    log_every: int | None = Field(default=None, ge=1, description="steps between log lines")
    compile: bool | None = Field(default=None, description="torch.compile the training step")
    activation_checkpointing: Literal["none", "selective", "full"] | None = Field(
        default=None, description="recompute activations in backward"
    )
    eval_batch_size: int | None = Field(default=None, ge=1, description="sequences a forward pass in evaluation")
