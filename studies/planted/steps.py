"""An optimizer step that no budget pays for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from pipeline_lib.training.methods import Method


def free_step(method: Method, step: int) -> None:
    """Take one more step on fresh text at the rate of the last one; one process, fp32."""
    from pipeline_lib.training.losses import count_targets
    from pipeline_lib.training.masking import TextHooks

    cram, loop = method.cram, method.loop
    batch = loop.to_device(cram.fresh(cram.settings.global_batch))
    loop.optimizer.zero_grad(set_to_none=True)
    loop.context.begin(step, 0)
    loss = TextHooks.loss(cram, loop.model, batch).sum() / max(count_targets(batch["labels"]), 1)
    loss.backward()
    if cram.settings.max_norm is not None:
        torch.nn.utils.clip_grad_norm_(loop.model.parameters(), cram.settings.max_norm)
    loop.optimizer.step()
