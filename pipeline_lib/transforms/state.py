"""What transforms add to a model: tensors under `<module>.transform.*`, apart from the model's own."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pipeline_lib.config.errors import UserError
from pipeline_lib.models.naming import split_transform


def split(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A state dict as (the model's own tensors, what transforms added)."""
    return split_transform(state)


def transform_state(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and persistent buffers that transforms added, by their name in the model."""
    return split(model.state_dict())[1]


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's own parameters and persistent buffers, as if it had never been transformed."""
    return split(model.state_dict())[0]


def load_transform_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load what `transform_state` gave into a model under the same transform.

    Raises:
        UserError: names or shapes differ.
    """
    own = transform_state(model)
    differing = sorted(set(own) ^ set(state))
    differing += sorted(name for name in set(own) & set(state) if own[name].shape != state[name].shape)
    if differing:
        raise UserError(
            "the checkpoint's transform state does not belong to this transform",
            value=differing[:5],
            allowed=f"{len(own)} tensors: {', '.join(sorted(own)[:5]) or 'none'}",
            fix="use the settings of the transform that the checkpoint was made with",
        )
    for name, tensor in own.items():
        assign(tensor, state[name])


@torch.no_grad()
def assign(target: Tensor, value: Tensor) -> None:
    """Write `value`, whole, into a parameter or buffer that may be sharded over ranks."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(target, DTensor):
        value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
    target.copy_(value)


def whole(tensor: Tensor) -> Tensor:
    """A parameter's full tensor, gathered from all ranks if it is sharded (then all ranks must call)."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
