"""Weights and optimizer state as plain named tensors: gathered from any sharding, put back into any other.

Files are safetensors and JSON, so a checkpoint of two ranks is also one of one rank, and none is a pickle.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from pipeline_lib.artifacts.files import read_json, write_json
from pipeline_lib.models.naming import is_transform_state
from pipeline_lib.training.distributed import rank

WEIGHTS, OPTIMIZER, HOOKS, VALUES = "weights.safetensors", "optimizer.safetensors", "hooks.safetensors", "state.json"


def named_state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, tied ones once (under the name `named_parameters` gives)."""
    own = {id(parameter): name for name, parameter in model.named_parameters()}
    tied = {name for name, parameter in model.named_parameters(remove_duplicate=False) if own[id(parameter)] != name}
    return {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if name not in tied}


def changing_state(model: nn.Module) -> dict[str, Tensor]:
    """`named_state` without the model's own weights that are frozen: what a checkpoint has to hold."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return {name: t for name, t in named_state(model).items() if name not in frozen or is_transform_state(name)}


def full(tensor: Tensor) -> Tensor | None:
    """The whole tensor on the CPU for rank 0, None for the others. All ranks must call it alike."""
    whole = tensor.detach()
    if isinstance(whole, DTensor):
        whole = whole.full_tensor()
    return whole.to("cpu", copy=True).contiguous() if rank() == 0 else None


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """Rank 0: name → whole CPU tensor, sorted by name. The others: nothing. All ranks must call it."""
    return _gathered(named_state(model))


def _gathered(state: dict[str, Tensor]) -> dict[str, Tensor]:
    whole = {name: full(tensor) for name, tensor in sorted(state.items())}
    return {name: tensor for name, tensor in whole.items() if tensor is not None}


def save_state(
    directory: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    values: dict[str, Any],
    hook_tensors: dict[str, Tensor] | None = None,
) -> None:
    """Write a training's state into `directory` (rank 0 writes, all ranks call). The caller seals it.

    Frozen weights stay out: who resumes has them from where the training began.

    Args:
        values: step and whatever else is not a tensor; JSON.
        hook_tensors: alike on all ranks.
    """
    weights = _gathered(changing_state(model))
    moments = {name: full(tensor) for name, tensor in _optimizer_tensors(model, optimizer)}
    if rank() == 0:
        directory.mkdir(parents=True, exist_ok=True)
        save_file(weights, directory / WEIGHTS)
        save_file({name: tensor for name, tensor in moments.items() if tensor is not None}, directory / OPTIMIZER)
        save_file({name: t.detach().cpu().contiguous() for name, t in (hook_tensors or {}).items()}, directory / HOOKS)
        write_json(directory / VALUES, values)


def load_weights(directory: Path, model: nn.Module) -> None:
    """Put saved weights back, in place, into a model of any sharding.

    Raises:
        KeyError, ValueError: the file holds other tensors than the model has.
    """
    with torch.no_grad(), safe_open(directory / WEIGHTS, "pt") as file:
        state = changing_state(model)
        if set(file.keys()) != set(state):
            raise KeyError(f"{directory / WEIGHTS} and the model differ in {sorted(set(file.keys()) ^ set(state))[:5]}")
        for name, tensor in state.items():
            tensor.copy_(_like(file.get_tensor(name), tensor))


def load_optimizer(directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put saved optimizer state back, sharded as the parameters are."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    owners = {names[id(p)]: p for group in optimizer.param_groups for p in group["params"]}
    with safe_open(directory / OPTIMIZER, "pt") as file:
        for key in file.keys():  # noqa: SIM118 (a safetensors file is no mapping)
            name, _, part = key.rpartition("/")
            value = file.get_tensor(key)
            # A moment has the parameter's shape and is sharded like it; AdamW's step counter is a plain scalar.
            parameter = owners[name]
            optimizer.state[parameter][part] = (
                _like(value, parameter) if value.shape == parameter.shape else _counter(value, parameter, optimizer)
            )


def load_hooks(directory: Path) -> dict[str, Tensor]:
    """The tensors that the recipe's hooks saved."""
    with safe_open(directory / HOOKS, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def load_values(directory: Path) -> dict[str, Any]:
    """The saved JSON values."""
    return read_json(directory / VALUES)


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """(parameter's name/part, tensor) in the order of the parameters, the same on every rank."""
    for name, parameter in model.named_parameters():
        for part, value in sorted(optimizer.state.get(parameter, {}).items()):
            if not isinstance(value, Tensor):
                raise TypeError(f"optimizer state {part} of {name} is {type(value).__name__}, not a tensor")
            yield f"{name}/{part}", value


def _like(whole: Tensor, example: Tensor) -> Tensor:
    """`whole` on the device and in the sharding of `example`."""
    moved = whole.to(example.device)
    if isinstance(example, DTensor):
        # Every rank has read the same file: no need to send anything (src_data_rank=None).
        return distribute_tensor(moved, example.device_mesh, example.placements, src_data_rank=None)
    return moved


def _counter(value: Tensor, parameter: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    # torch keeps AdamW's step on the CPU unless the fused or capturable kernel reads it on the device.
    group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
    return value.to(parameter.device) if group.get("fused") or group.get("capturable") else value
