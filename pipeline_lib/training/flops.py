"""FLOPs of a model's forward pass, counted on the model itself."""

from __future__ import annotations

from typing import Any

from torch import nn

from pipeline_lib.models.blocks import blocks
from pipeline_lib.training.budget import forward_flops


def forward_parts(model: Any, seq_len: int, head_share: float) -> tuple[float, float]:
    """FLOPs of a sequence's forward pass through (one layer, everything behind the layers).

    Matrix products of linear layers and attention count; embeddings, norms and activations do not.

    Args:
        model: a Hugging Face language model.
        head_share: share of the tokens that its head is computed for.
    """
    [layer, *_] = layers = blocks(model)
    inside = {id(module) for block in layers for module in block.modules()}
    rest = [m for m in model.modules() if isinstance(m, nn.Linear) and id(m) not in inside]
    in_layer = sum(_weights(m) for m in layer.modules() if isinstance(m, nn.Linear))
    dim = model.config.hidden_size
    return forward_flops(in_layer, dim, seq_len), 2.0 * sum(map(_weights, rest)) * seq_len * head_share


def _weights(layer: nn.Linear) -> int:
    return layer.in_features * layer.out_features
