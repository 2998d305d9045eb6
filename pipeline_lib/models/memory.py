"""Memory of a training on its device: a statement of what it consists of, and the allocator's own word to check it by.

The statement counts tensors: weights (and what else the model holds), adapters, their gradients, AdamW's two moments,
and activations, that is, the bytes that autograd keeps of one micro-batch's forward pass for the backward pass, and
two tensors in the shape of the logits, fp32, which the loss's own backward pass makes while all of these are alive.
Where blocks are recomputed, only their inputs are kept, and the inside of one takes the place of the loss's two tensors
where it is larger.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from pipeline_lib.models.blocks import blocks
from pipeline_lib.models.naming import is_adapter

MIB = 2**20


@dataclass(frozen=True)
class Account:
    """Bytes on one device, by component; `host` lies beside it in the memory of the host."""

    weights: int = 0
    adapters: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    host: int = 0

    def total(self, accumulates: bool = True) -> int:
        """The highest use of the device.

        Args:
            accumulates: several micro-batches a step, so that gradients are there while activations are. Else
                gradients grow as activations shrink.
        """
        moving = (self.gradients, self.activations)
        return self.weights + self.adapters + self.optimizer + (sum(moving) if accumulates else max(moving))

    def figures(self) -> dict[str, float]:
        """MiB, by name, for a log."""
        return {f"mem_{name}_mib": round(value / MIB, 3) for name, value in vars(self).items()}


@dataclass(frozen=True)
class Activations:
    """Bytes that a forward pass leaves for the backward pass.

    Attributes:
        saved: all that autograd keeps, of recomputed blocks their inputs.
        input: the input of a block.
        block: what autograd keeps of one block alone.
        layers: number of blocks.
        recompute: whether blocks are recomputed.
        logits: elements of the logits.
    """

    saved: int
    input: int
    block: int
    layers: int
    recompute: bool
    logits: int

    def total(self, layers: int | None = None) -> int:
        """Of this model, or of the same with another number of blocks."""
        more = (self.layers if layers is None else layers) - self.layers
        loss = 2 * 4 * self.logits
        if self.recompute:  # the loss is done with when the first block is computed again
            return self.saved + more * self.input + max(self.block, loss)
        return self.saved + more * self.block + loss


def size(tensor: Tensor) -> int:
    """Bytes on this device, of a sharded tensor those of its part here."""
    local = getattr(tensor, "to_local", None)
    tensor = local() if local is not None else tensor
    return tensor.numel() * tensor.element_size()


def state_account(model: nn.Module, host: int = 0, among: nn.Module | None = None) -> Account:
    """What a training with AdamW holds from step to step: all but activations.

    Args:
        host: bytes that lie on the host.
        among: count only what this part of the model holds.
    """
    named = list((among or model).named_parameters(remove_duplicate=True))
    prefix = "" if among is None else next(n for n, m in model.named_modules() if m is among) + "."
    own = [(f"{prefix}{name}", parameter) for name, parameter in named]
    buffers = sum(size(buffer) for buffer in (among or model).buffers())
    trained = sum(size(p) for _, p in own if p.requires_grad)
    adapters = sum(size(p) for name, p in own if is_adapter(name))
    weights = sum(size(p) for name, p in own if not is_adapter(name)) + buffers
    return Account(weights, adapters, trained, 2 * trained, 0, host)


class _Kept:
    """Counts what autograd keeps that is no parameter and no buffer, each memory once."""

    def __init__(self, model: nn.Module) -> None:
        self._own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
        self._found: dict[int, int] = {}

    def __enter__(self) -> _Kept:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *problem: Any) -> None:
        self._hooks.__exit__(*problem)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._own:
            self._found[storage.data_ptr()] = storage.nbytes()
        return tensor

    def skip(self, tensor: Tensor) -> None:
        self._own.add(tensor.untyped_storage().data_ptr())

    @property
    def bytes(self) -> int:
        return sum(self._found.values())


def activations(model: nn.Module, forward: Callable[[], Tensor]) -> tuple[Tensor, Activations]:
    """(what `forward` gave, what it leaves for its backward pass); one block is run a second time to see inside it.

    For a model on one device that is not sharded.

    Args:
        forward: a forward pass of `model` on a micro-batch, to the loss.
    """
    layers, seen = blocks(model), {}

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.setdefault("block", (module, [_detached(a) for a in args], {k: _detached(v) for k, v in kwargs.items()}))

    def after(module: nn.Module, args: Any, output: Any) -> None:
        seen["logits"] = output.logits.numel()

    handles = [layers[0].register_forward_pre_hook(before, with_kwargs=True), model.register_forward_hook(after)]
    try:
        with _Kept(model) as whole:
            loss = forward()
    finally:
        for handle in handles:
            handle.remove()
    block, args, kwargs = seen["block"]
    first = next(value for value in [*args, *kwargs.values()] if isinstance(value, Tensor))
    with _Kept(model) as inside, torch.enable_grad():
        # The class's `forward`: the block's own may be wrapped to recompute. Its input is the block before's output.
        inside.skip(first)
        type(block).forward(block, *args, **kwargs)
    recompute = bool(getattr(block, "gradient_checkpointing", False))
    return loss, Activations(whole.bytes, size(first), inside.bytes, len(layers), recompute, seen["logits"])


def _detached(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().requires_grad_(value.requires_grad)


@dataclass(frozen=True)
class Measured:
    """A training's stated and measured memory.

    Attributes:
        account: what it states.
        block: the part of one block in it, activations apart.
        kept: its activations.
        peak: bytes by the allocator's count.
    """

    account: Account
    block: Account
    kept: Activations
    peak: int

    def at(self, layers: int, work: float = 1.0) -> Account:
        """The account of the model with another number of blocks, and `work` times as many tokens a micro-batch."""
        more = layers - self.kept.layers
        grown = {name: value + more * getattr(self.block, name) for name, value in vars(self.account).items()}
        return Account(**{**grown, "activations": round(work * self.kept.total(layers))})


def allocated_peak(work: Callable[[], Any], device: torch.device) -> int:
    """The highest number of bytes that the allocator had given out while `work` ran, what was there before not counted.

    On CUDA the allocator keeps count; on a CPU torch's profiler sees each allocation.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    results: Any = cast(Any, profile.profiler).kineto_results
    changes = [(event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]"]
    now = peak = 0
    for _, change in sorted(changes, key=lambda entry: entry[0]):
        now += change
        peak = max(peak, now)
    return peak
