"""What torchtitan is told of us: its job configuration and the parts it is to use."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.lr_scheduler import LRSchedulersContainer
from torchtitan.components.metrics import DeviceMemStats, MetricsProcessor
from torchtitan.components.optimizer import OptimizersContainer, build_optimizers
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.models.llama3 import parallelize_llama
from torchtitan.models.llama3.infra.parallelize import apply_fsdp
from torchtitan.protocols.train_spec import TrainSpec, register_train_spec
from torchtitan.tools.utils import NoColor, device_type

from pipeline_lib.data.tokens import BatchLoader, TokenShards
from pipeline_lib.training.schedules import lr_factor
from pipeline_lib.training.titan.loss import build_loss
from pipeline_lib.training.titan.model import TitanLlama, model_args
from pipeline_lib.training.titan.plan import Plan

FLAVOR = "model"
_numbers = itertools.count()


def job_config(plan: Plan, name: str) -> JobConfig:
    """torchtitan's configuration of a plan, for the train spec registered as `name`."""
    config, recipe = JobConfig(), plan.recipe
    config.job.dump_folder = str(plan.job.work / "titan")
    config.model.name, config.model.flavor = name, FLAVOR
    config.optimizer.name, config.optimizer.implementation = "AdamW", "fused"
    config.optimizer.lr, config.optimizer.eps = recipe.lr, recipe.eps
    config.optimizer.beta1, config.optimizer.beta2 = recipe.betas
    config.optimizer.weight_decay = recipe.weight_decay
    training = config.training
    training.local_batch_size, training.global_batch_size = plan.sharing.micro_batch, recipe.global_batch
    training.seq_len, training.steps, training.max_norm = recipe.seq_len, plan.steps, recipe.max_norm
    training.mixed_precision_param = "bfloat16" if recipe.precision == "bf16" else "float32"
    training.mixed_precision_reduce = "float32"
    training.gc_freq = 100
    config.parallelism.data_parallel_replicate_degree = 1  # torchtitan's replicate averages gradients, FSDP sums
    config.parallelism.data_parallel_shard_degree = -1
    if device_type == "cpu":
        config.parallelism.fsdp_reshard_after_forward = "never"
    config.activation_checkpoint.mode = plan.option("activation_checkpointing", "none")
    config.compile.enable = bool(plan.option("compile", False))
    config.debug.seed = plan.seed
    config.checkpoint.enable = False  # ours are sealed: titan/state.py
    config.validation.enable = False
    return config


def register(plan: Plan, transform: Callable[[nn.Module], None]) -> str:
    """Register the parts of a plan with torchtitan; the name to find them by.

    Args:
        plan: what to train.
        transform: called on the model while it is on the meta device, before it is sharded.
    """
    name = f"errata-{next(_numbers)}"
    spec = TrainSpec(
        model_cls=TitanLlama,
        model_args={FLAVOR: model_args(plan.model, plan.seed)},
        parallelize_fn=partial(_parallelize, plan=plan, transform=transform),
        pipelining_fn=None,
        build_optimizers_fn=build_optimizers,
        build_lr_schedulers_fn=partial(_lr_schedulers, plan=plan),
        build_dataloader_fn=lambda **_: GlobalBatches(plan),
        build_tokenizer_fn=None,
        build_loss_fn=build_loss,
        build_metrics_processor_fn=QuietMetrics,
    )
    register_train_spec(name, spec)
    return name


def _parallelize(
    model: nn.Module, dims: ParallelDims, config: JobConfig, plan: Plan, transform: Callable[[nn.Module], None]
) -> nn.Module:
    transform(model)
    model = parallelize_llama(model, dims, config)
    if plan.sharded and plan.sharing.world == 1:
        from torch.distributed.device_mesh import init_device_mesh

        mesh = init_device_mesh(device_type, (1,), mesh_dim_names=("fsdp",))
        apply_fsdp(model, mesh, torch.bfloat16, torch.float32, pp_enabled=False)
    if device_type == "cpu":
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)  # gloo has no PREMUL_SUM
    return model


def _lr_schedulers(optimizers: OptimizersContainer, config: Any, steps: int, plan: Plan) -> LRSchedulersContainer:
    del config
    recipe = plan.recipe

    def factor(step: int) -> float:
        return lr_factor(step, steps, plan.warmup_steps, recipe.decay, recipe.min_lr_factor)

    return LRSchedulersContainer(optimizers, factor)


class GlobalBatches(BaseDataLoader):
    """This rank's micro-batches of every step. Its position is the step alone, so it has no state to save."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        shards = TokenShards(plan.job.inputs["tokens"], "train")
        recipe = plan.recipe
        self.loader = BatchLoader(shards, recipe.seq_len, recipe.global_batch, plan.seed)

    def micro_batches(self, step: int) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """(index of the first sequence in the global batch, inputs [b, T], labels [b, T]) of step `step` (from 0)."""
        for first in self.plan.sharing.firsts():
            inputs_BT, labels_BT = self.loader.batch(step, first, self.plan.sharing.micro_batch)
            yield first, inputs_BT, labels_BT

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        for step in itertools.count():
            for _, inputs_BT, labels_BT in self.micro_batches(step):
                yield {"input": inputs_BT}, labels_BT

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        assert not state_dict


class QuietMetrics(MetricsProcessor):
    """Takes the place of torchtitan's metrics, which print on their own; ours are in training/metrics.py."""

    device_name = "unknown"
    color = NoColor()

    def __init__(self, job_config: JobConfig, parallel_dims: ParallelDims, model_args: Any = None) -> None:
        self.job_config, self.parallel_dims = job_config, parallel_dims
        self.device_memory_monitor = self  # type: ignore[assignment]
        if device_type == "cuda":
            self.device_name = torch.cuda.get_device_name()

    def get_peak_stats(self) -> DeviceMemStats:
        return DeviceMemStats(0.0, 0.0, 0.0, 0.0, 0, 0)

    def close(self) -> None:
        pass
