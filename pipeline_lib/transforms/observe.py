"""What the layers of a model see, and state that is chosen from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline_lib.artifacts.files import read_json, sha256_file, write_json
from pipeline_lib.artifacts.progress import Progress, say
from pipeline_lib.config.errors import UserError
from pipeline_lib.transforms.apply import STATE, Applied
from pipeline_lib.transforms.base import Function, Site
from pipeline_lib.transforms.state import assign, whole


def calibrated_functions(applied: Applied) -> dict[str, tuple[nn.Module, Function]]:
    """`<site>.transform.<function>` → (module, function) of all that are calibrated from a layer's inputs."""
    return _functions(applied, "calibrated")


def observers(applied: Applied) -> dict[str, tuple[nn.Module, Function]]:
    """The same for functions that observe passes."""
    return _functions(applied, "observes")


def _functions(applied: Applied, which: str) -> dict[str, tuple[nn.Module, Function]]:
    return {
        _state_name(found.site, name): (found.module, function)  # type: ignore[dict-item]
        for found, functions in applied.at
        for name, function in functions.stateful().items()
        if getattr(function, which, False)
    }


def _state_name(site: Site, function: str) -> str:
    """The prefix of a function's state in the model: attention holds that of its sites, by their last name."""
    if site.shape:
        return f"{site.name}.{STATE}.{function}"
    around, _, part = site.name.rpartition(".")
    return f"{around}.{STATE}.{part}.{function}"


@torch.no_grad()
def watch(applied: Applied, model: nn.Module, batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """Let functions choose their state from passes of the exact model; other functions stay as they are.

    Args:
        batches: token ids [sequences, positions], each settled like a training step.

    Returns:
        All state of the functions by its name in the model, on the CPU.

    Raises:
        UserError: there is no such function, or no batch.
    """
    functions = observers(applied)
    if not functions:
        raise _nothing_to_calibrate(applied)
    device = next(model.parameters()).device
    done = 0
    for _, function in functions.values():
        function.observing = True
    try:
        for done, tokens_BT in enumerate(batches, 1):
            applied.context.begin(done - 1, 0)
            model(input_ids=tokens_BT.to(device))
            applied.settle()
    finally:
        for _, function in functions.values():
            function.observing = False
    if not done:
        raise UserError("the calibration has no batch", where="transform", fix="give it a dataset with text")
    return {name: tensor.detach().cpu().clone() for name, tensor in _states(functions).items()}


def load_observed(applied: Applied, state: Mapping[str, Tensor]) -> None:
    """Give functions that observe what those of the same name and shape saw in the weights' own training."""
    for name, tensor in _states(observers(applied)).items():
        if name in state and state[name].shape == tensor.shape:
            assign(tensor, state[name])


def _states(functions: Mapping[str, tuple[nn.Module, Function]]) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": tensor
        for name, (_, function) in functions.items()
        for key, tensor in getattr(function, "state_dict")(keep_vars=True).items()  # noqa: B009 - they are modules
    }


def _nothing_to_calibrate(applied: Applied) -> UserError:
    return UserError(
        "the calibration has no layer to act on",
        where="transform",
        value=[entry["type"] for entry in applied.entries],
        fix="let it act on a linear layer, or switch the calibration off",
    )


@torch.no_grad()
def sampled_inputs(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Tensor], every: int
) -> dict[str, Tensor]:
    """Every `every`-th token's input of each layer, fp32 on the CPU, in one pass over the text.

    Args:
        model: without transforms.
        layers: name → linear layer.
        batches: token ids [sequences, positions]; tokens are counted through all of them, from 0.
        every: at least 1.

    Returns:
        name → [tokens, in]. Layers that see the same tensor share one.
    """
    kept: dict[str, list[Tensor]] = {name: [] for name in layers}
    start = 0
    last: tuple[Tensor, Tensor] | None = None

    def keep(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, given: tuple[Any, ...]) -> None:
            nonlocal last
            x = given[0]
            if last is None or last[0] is not x:
                flat = x.reshape(-1, x.shape[-1])
                last = x, flat[-start % every :: every].float().cpu().clone()
            kept[name].append(last[1])

        return hook

    handles = [layer.register_forward_pre_hook(keep(name)) for name, layer in layers.items()]
    device = next(model.parameters()).device
    try:
        for tokens_BT in batches:
            model(input_ids=tokens_BT.to(device))
            start += tokens_BT.numel()
            last = None
    finally:
        for handle in handles:
            handle.remove()
    return {name: parts[0] if len(parts) == 1 else torch.cat(parts) for name, parts in kept.items()}


def calibrate(
    applied: Applied, inputs: Callable[[], Mapping[str, Tensor]], work: Path, device: torch.device
) -> tuple[dict[str, Tensor], dict[str, dict[str, float]]]:
    """Choose the state of every calibrated function, layer by layer; finished layers are kept in `work`.

    Args:
        inputs: gives what the modules of `calibrated_functions` see, by their names; called if a layer is left to do.

    Returns:
        State by its full name (`<site>.transform.<function>.<tensor>`), and each layer's figures.

    Raises:
        UserError: no function of the transform is calibrated.
    """
    functions = calibrated_functions(applied)
    if not functions:
        raise _nothing_to_calibrate(applied)
    state: dict[str, Tensor] = {}
    report: dict[str, dict[str, float]] = {}
    todo: list[str] = []
    for name in functions:
        found = _finished(work, name)
        if found is None:
            todo.append(name)
        else:
            state |= found[0]
            report[name] = found[1]
    seen = inputs() if todo else {}
    with Progress("calibrate", len(functions), "layers", done=len(functions) - len(todo)) as progress:
        for name in todo:
            module, function = functions[name]
            weight: Any = module.weight
            values, figures = function.calibrate(weight.detach().float().to(device), seen[name].to(device))
            own = {f"{name}.{key}": value.cpu().contiguous() for key, value in values.items()}
            _finish(work, name, own, figures)
            state |= own
            report[name] = figures
            progress.update()
    return {name: state[name] for name in sorted(state)}, {name: report[name] for name in functions}


def load_calibrated(applied: Applied, state: Mapping[str, Tensor]) -> None:
    """Give calibrated functions their state.

    Raises:
        UserError: it is that of other layers or shapes.
    """
    own = _states({**calibrated_functions(applied), **observers(applied)})
    wrong = sorted(name for name in state if name not in own or own[name].shape != state[name].shape)
    if wrong or not state:
        raise UserError(
            "the calibration does not belong to this transform",
            value=wrong[:5],
            allowed=sorted(own)[:5],
            fix="remove the clip artifact, so that it is made again",
        )
    for name, value in state.items():
        assign(own[name], value)


@torch.no_grad()
def absorb(applied: Applied) -> None:
    """Let calibrated functions work their state into the weights that a training starts with."""
    done: set[int] = set()
    for module, function in calibrated_functions(applied).values():
        # Not module.weight: a layer with adapters forms that anew at each reading.
        weight = dict(module.named_parameters(recurse=False))["weight"]
        if id(weight) not in done:
            assign(weight, function.absorb(whole(weight.detach())))
            done.add(id(weight))


def _finish(work: Path, name: str, state: dict[str, Tensor], figures: dict[str, float]) -> None:
    work.mkdir(parents=True, exist_ok=True)
    path = work / f"{name}.safetensors"
    save_file(state, path)
    write_json(work / f"{name}.json", {"sha256": sha256_file(path), "figures": figures})


def _finished(work: Path, name: str) -> tuple[dict[str, Tensor], dict[str, float]] | None:
    path, note = work / f"{name}.safetensors", work / f"{name}.json"
    if not note.exists():
        return None
    try:
        about = read_json(note)
        if sha256_file(path) == about["sha256"]:
            return load_file(path), about["figures"]
    except (OSError, ValueError, KeyError):
        pass
    say(f"{path} is damaged; this layer is searched again")
    return None
