"""Memory of a training on its device: a statement of what it consists of, and the allocator's own word to check it by.

The statement counts tensors: weights (and what else the model holds), adapters, their gradients, AdamW's two moments,
and activations, that is, the bytes that autograd keeps of one micro-batch's forward pass for the backward pass, and
what is made beside them at the tightest of these moments:

* at the loss: two tensors in the shape of the logits, fp32, and what autocast has kept of the weights of recomputed
  blocks in half precision (outside of these, autograd keeps it anyway);
* where gradients are added up over micro-batches, at the largest weight outside the blocks: its gradient once more,
  before it is added;
* where blocks are recomputed, so that only their inputs are kept: the inside of one, and its largest gradient.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
    """Bytes that a forward pass leaves for the backward pass, and what is made beside them.

    Attributes:
        saved: all that autograd keeps, of recomputed blocks their inputs.
        input: the input of a block.
        block: what autograd keeps of one block alone.
        layers: number of blocks.
        recompute: whether blocks are recomputed.
        logits: elements of the logits.
        copies: of a block's weights in half precision, which autocast keeps to the end of the forward pass.
        gradient, block_gradient: the largest gradient outside the blocks and in one, while it is added; or 0.
    """

    saved: int
    input: int
    block: int
    layers: int
    recompute: bool
    logits: int
    copies: int = 0
    gradient: int = 0
    block_gradient: int = 0

    def total(self, layers: int | None = None) -> int:
        """Of this model, or of the same with another number of blocks."""
        layers = self.layers if layers is None else layers
        more, loss = layers - self.layers, 2 * 4 * self.logits
        if not self.recompute:
            return self.saved + more * self.block + max(loss, self.gradient)
        moments = (loss + layers * self.copies, self.gradient, self.block + self.block_gradient)
        return self.saved + more * self.input + max(moments)

    def of_tokens(self, share: float, other: Activations, other_share: float) -> Activations:
        """Of a micro-batch of another size, in proportion; from two sizes, since weights' copies do not grow with it.

        Args:
            share, other_share: tokens here, and in `other`, as a share of those asked for.
        """
        slope = (1 - share) / (share - other_share)
        sizes = {
            name: round(getattr(self, name) + slope * (getattr(self, name) - getattr(other, name)))
            for name in ("saved", "input", "block", "logits")
        }
        return replace(self, **sizes)


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


def activations(
    model: nn.Module, forward: Callable[[], Tensor], accumulates: bool = True
) -> tuple[Tensor, Activations]:
    """(what `forward` gave, what it leaves for its backward pass); one block is run a second time to see inside it.

    For a model on one device that is not sharded.

    Args:
        forward: a forward pass of `model` on a micro-batch, to the loss.
        accumulates: gradients of several micro-batches are added up.
    """
    layers, seen = blocks(model), {}

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        kind = next(model.parameters()).device.type
        half = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        found = (module, [_detached(a) for a in args], {k: _detached(v) for k, v in kwargs.items()}, kind, half)
        seen["block"] = found  # of the last that runs: methods leave some out

    def after(module: nn.Module, args: Any, output: Any) -> None:
        seen["logits"] = output.logits.numel()

    handles = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
    handles.append(model.register_forward_hook(after))
    try:
        with _Kept(model) as whole:
            loss = forward()
    finally:
        for handle in handles:
            handle.remove()
    block, args, kwargs, kind, half = seen["block"]
    first = next(value for value in [*args, *kwargs.values()] if isinstance(value, Tensor))
    recompute = bool(getattr(block, "gradient_checkpointing", False))
    block.gradient_checkpointing = False  # or the inside would stay hidden once more
    try:
        with _Kept(model) as inside, torch.enable_grad(), torch.autocast(kind, dtype=half, enabled=half is not None):
            inside.skip(first)  # the block before's output
            block.forward(*args, **kwargs)
    finally:
        block.gradient_checkpointing = recompute
    outside = largest_gradient(model, half is not None, skip=layers) if accumulates else 0
    own = largest_gradient(block, half is not None) if accumulates else 0
    copies = _autocast_copies(block) if half is not None else 0
    found = (whole.bytes, size(first), inside.bytes, len(layers), recompute, seen["logits"], copies, outside, own)
    return loss, Activations(*found)


def largest_gradient(model: nn.Module, autocast: bool, skip: Sequence[nn.Module] = ()) -> int:
    """Bytes of the largest gradient while it is made: fp32, under autocast from one in half precision.

    Args:
        skip: parts whose parameters do not count.
    """
    others = {id(parameter) for part in skip for parameter in part.parameters()}
    sizes = [
        (size(parameter) * 3 // 2 if autocast and not isinstance(module, nn.Embedding) else size(parameter))
        for module in model.modules()
        for parameter in module.parameters(recurse=False)
        if parameter.requires_grad and id(parameter) not in others
    ]
    return max(sizes, default=0)


def _autocast_copies(block: nn.Module) -> int:
    """Bytes of the copies that autocast makes, and keeps, of a block's trained fp32 matrices.

    A matrix that a transform works on is none of its own: its copies are made anew and are not kept.
    """
    sites = [getattr(module, "functions_at_site", None) for module in block.modules()]
    return sum(
        2 * parameter.numel()
        for module, site in zip(block.modules(), sites, strict=True)
        if site is None or not site.holds("weight")
        for parameter in module.parameters(recurse=False)
        if parameter.requires_grad and parameter.ndim == 2 and parameter.dtype == torch.float32
    )


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
        tokens: of a micro-batch.
        peak: bytes by the allocator's count.
    """

    account: Account
    block: Account
    kept: Activations
    tokens: int
    peak: int

    def at(self, layers: int, tokens: int, other: Measured) -> Account:
        """The account of the model with another number of blocks and of tokens a micro-batch.

        Args:
            other: the same training, measured with another number of tokens.
        """
        kept = self.kept.of_tokens(self.tokens / tokens, other.kept, other.tokens / tokens)
        more = layers - self.kept.layers
        grown = {name: value + more * getattr(self.block, name) for name, value in vars(self.account).items()}
        return Account(**{**grown, "activations": kept.total(layers)})


def allocated_peak(work: Callable[[], Any], device: torch.device) -> int:
    """The highest number of bytes that the allocator had given out while `work` ran, what was there before not counted.

    On CUDA the allocator keeps count; on a CPU torch's profiler sees each allocation.
    """
    gc.collect()  # garbage of before, collected meanwhile, would count as memory that `work` gave back
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
