"""Two training steps of a copy of a model, measured and accounted for."""

from __future__ import annotations

import copy
import gc
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline_lib.evaluation.base import Subject
from pipeline_lib.models.blocks import blocks
from pipeline_lib.models.memory import (
    Measured,
    activations,
    allocated_peak,
    size,
    state_account,
)
from pipeline_lib.models.naming import is_adapter
from pipeline_lib.transforms.apply import apply
from pipeline_lib.transforms.low_rank import add_adapters, freeze

if TYPE_CHECKING:
    from pipeline_lib.evaluation.tasks.memory import Settings
    from pipeline_lib.transforms.context import FaultContext

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
STEPS = 2  # the optimizer has its state from the second on


def measure(subject: Subject, arm: str, settings: Settings, seed: int, use_up: bool = False) -> Measured:
    """One arm's account, and the allocator's word.

    Args:
        use_up: train the subject's own fp32 model and not a copy, where there is no memory for both.
    """
    device = next(subject.model.parameters()).device
    # Made on the host, as a training makes it: there a weight is whole before it is packed.
    # Together, so that the copy's faults heed the copy's context.
    model: Any
    model, context = (subject.model, subject.context) if use_up else copy.deepcopy((subject.model, subject.context))
    model = model.cpu().float().train()
    if arm == "relora_ternary":
        context = apply(model, [{"type": "ternary", **settings.ternary}], seed=seed).context
    host, host_block = (0, 0) if arm == "full" else _adapted(model, arm, settings)
    if settings.activation_checkpointing == "full":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    there = 0 if device.type == "cuda" else sum(size(t) for t in [*model.parameters(), *model.buffers()])
    peak = there + allocated_peak(lambda: _train(model.to(device), context, settings, seed), device)
    # Afterwards: to look inside a block takes memory of its own.
    _, kept = activations(model, lambda: _loss(model, context, settings, seed), settings.accumulation > 1)
    account = replace(state_account(model, host), activations=kept.total())
    block = state_account(model, host_block, among=blocks(model)[0])
    gc.collect()
    return Measured(account, block, kept, settings.micro_batch * settings.seq_len, peak)


def _train(model: Any, context: FaultContext | None, settings: Settings, seed: int) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    for step in range(STEPS):
        for _ in range(settings.accumulation):
            _loss(model, context, settings, seed, step).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _loss(model: Any, context: FaultContext | None, settings: Settings, seed: int, step: int = STEPS) -> Tensor:
    """Of a micro-batch of random tokens."""
    if context is not None:
        context.begin(step, 0)
    device, shape = next(model.parameters()).device, (settings.micro_batch, settings.seq_len)
    tokens_BT = torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(seed)).to(device)
    dtype = DTYPES[settings.precision]
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        logits_BTV = model(input_ids=tokens_BT).logits
        return F.cross_entropy(logits_BTV.float().flatten(0, 1), tokens_BT.flatten())


def _adapted(model: Any, arm: str, settings: Settings) -> tuple[int, int]:
    """Freeze the base and add adapters; bytes of fp32 master weights on the host, of all blocks and of one."""
    adapted = add_adapters(model, ("*",), settings.rank)
    masters = 0
    for name, layer in adapted.items():
        masters += 4 * layer.weight.numel()
        freeze(layer, DTYPES[settings.base])
        layer.low_rank.reset(name)
    if arm == "lora":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(is_adapter(name))
        return 0, 0
    return masters, masters // len(blocks(model))
