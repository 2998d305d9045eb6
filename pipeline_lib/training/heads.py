"""A model's head apart from the model: what it would see, and another computation in its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pipeline_lib.config.errors import UserError

AFTER_THE_HEAD = ("final_logit_softcapping", "logit_scale", "logits_scaling", "output_multiplier_scale")
"""Settings of models (Gemma, Cohere, Granite) that change logits after the head."""


def hidden_states(model: Any, ids_BT: Tensor) -> Tensor:
    """What a model's head would see, [B, T, D], without gradient."""
    with torch.no_grad(), head_replaced(model, lambda head, hidden_BTD: hidden_BTD):
        return model(input_ids=ids_BT, use_cache=False).logits


@contextmanager
def head_replaced(model: Any, compute: Callable[[nn.Module, Tensor], Tensor]) -> Iterator[None]:
    """Let `compute(head, hidden)` stand where the model's forward pass calls its head.

    Inside the forward pass of the whole model, so that sharded weights are there. `head` computes as ever.
    """
    head = model.get_output_embeddings()
    forward = head.forward

    def own(hidden_BTD: Tensor) -> Tensor:
        return forward(hidden_BTD)

    head.forward = lambda hidden_BTD: compute(own, hidden_BTD)  # type: ignore[arg-type]
    try:
        yield
    finally:
        del head.forward


def assert_plain_head(model: Any) -> None:
    """The loss runs the head itself, so nothing may come after it in the model's forward pass."""
    after = [name for name in AFTER_THE_HEAD if getattr(model.config, name, None) not in (None, 1.0)]
    if after:
        raise UserError(
            "its logits are more than the product of hidden states and head, which this loss does not know",
            where=f"recipe.distill: {type(model).__name__}",
            value=after,
            allowed="models like llama",
            fix="use another model",
        )
