"""Modules that are re-classed in place: their parameters, names and hooks stay, only `forward` changes."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline_lib.config.errors import UserError
from pipeline_lib.transforms.attention import AttentionSites
from pipeline_lib.transforms.compose import SiteFunctions


class LinearAtSite:
    """Mixin before a class derived from `nn.Linear`."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    functions_at_site: SiteFunctions
    shared_input: SharedInput | None = None

    def forward(self, input: Tensor) -> Tensor:
        """[sequences, positions, in] or [sequences, in] -> the same with `out` features."""
        functions = self.functions_at_site
        if self.shared_input is None:
            input = load_input(functions, input)
        else:
            self.shared_input.check(input)
        if functions.multiplying_store is not None:
            return _by_device(functions, input, self.weight, self._multiply, True)
        return _by_device(functions, input, self.weight, self._multiply)

    def _multiply(self, input: Tensor, weight: Tensor | dict[str, Tensor], first_sequence: int = 0) -> Tensor:
        """The product with a weight, or with the stored tensors of one that is not loaded."""
        functions = self.functions_at_site
        if isinstance(weight, dict):
            assert functions.multiplying_store is not None
            return functions.multiplying_store.multiply(weight, input, self.bias)
        if functions.compute is None:
            return F.linear(input, weight, self.bias)
        return functions.meet(input, weight, self.bias, **_place(functions, input), first_sequence=first_sequence)


def load_input(functions: SiteFunctions, input: Tensor) -> Tensor:
    """The input of a linear layer as the layer reads it."""
    return functions.activation(input, "input", first_position(functions, input))


def first_position(functions: SiteFunctions, input: Tensor) -> Tensor:
    """The position of input[:, 0]."""
    context = functions.context
    if context.tokens is not None and input.ndim > 2:
        return context.position + (context.tokens - input.shape[1])  # a head that sees the last tokens only
    return context.position


def _place(functions: SiteFunctions, input: Tensor) -> dict[str, Any]:
    """Where the result of [sequences, positions, …, features] or [sequences, features] lies; see `Draw.strides`."""
    if input.ndim < 3:
        return {}
    strides = [prod(input.shape[axis + 1 : -1]) for axis in range(1, input.ndim - 1)]
    return {"first_vector": first_position(functions, input) * strides[0], "strides": tuple(strides)}


class SharedInput:
    """The input of several linear layers, which the module around them loads once from one memory.

    Args:
        functions: of the first of the layers; what happens to the input of each is the same.
    """

    def __init__(self, functions: SiteFunctions) -> None:
        self.functions = functions
        self._loaded: Tensor | None = None

    def install(self, around: nn.Module) -> Callable[[], None]:
        """Load the first argument of `around` before its forward pass; returns what undoes it."""
        hooks = [
            around.register_forward_pre_hook(self._load, with_kwargs=True),
            around.register_forward_hook(self._forget, always_call=True),
        ]

        def undo() -> None:
            for hook in hooks:
                hook.remove()

        return undo

    def check(self, input: Tensor) -> None:
        """Refuse an input that is not the loaded one."""
        if not torch.compiler.is_compiling() and input is not self._loaded:
            raise RuntimeError(
                f"{self.functions.site.name} and the layers beside it do not read what the module around them reads; "
                "set shared_input to false"
            )

    def _load(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        name = None if args else next(iter(kwargs))
        loaded = load_input(self.functions, args[0] if name is None else kwargs[name])
        if not torch.compiler.is_compiling():
            self._loaded = loaded
        return ((loaded, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: loaded})

    def _forget(self, *_: Any) -> None:
        self._loaded = None


class EmbeddingAtSite:
    """Mixin before a class derived from `nn.Embedding`."""

    weight: nn.Parameter
    padding_idx: int | None
    functions_at_site: SiteFunctions

    def forward(self, input: Tensor) -> Tensor:
        """Token ids [sequences, …] -> [sequences, …, features]."""
        functions = self.functions_at_site
        shared = functions.site.name.endswith("position_embeddings")
        if shared and functions.context.fault_devices > 1 and functions.is_faulty("weight"):
            raise UserError(
                "position embeddings are looked up once for all sequences and cannot differ between virtual devices",
                where=functions.site.name,
                fix=f"exclude them with `sites: {{{functions.site.name}: null}}`, or set fault_devices to 1",
            )
        store = functions.multiplying_store
        if store is not None:  # only the rows that are asked for are decoded
            return _by_device(
                functions,
                input,
                self.weight,
                lambda ids, stored, _: store.decode({part: rows[ids] for part, rows in stored.items()}, "weight"),
                True,
            )
        return _by_device(functions, input, self.weight, self._look_up)

    def _look_up(self, ids: Tensor, weight: Tensor, first_sequence: int) -> Tensor:
        functions = self.functions_at_site
        if functions.compute is None:
            return F.embedding(ids, weight, self.padding_idx)
        first = {"first_vector": functions.context.position, "first_sequence": first_sequence}
        return functions.meet(ids, weight, strides=(1,) * (ids.ndim - 1), **first)


class InnerAttentionAtSites:
    """Mixin before torchtitan's wrapper of scaled dot product attention."""

    attention_sites: AttentionSites

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
        is_causal: bool = True,
    ) -> Tensor:
        """q [B, heads, T, D], k and v [B, kv_heads, T, D] -> [B, heads, T, D]."""
        k, v = self.attention_sites.read(q, k, v)
        if not self.attention_sites.is_explicit:
            return super().forward(q, k, v, scale=scale, enable_gqa=enable_gqa, is_causal=is_causal)  # type: ignore[misc]
        factor: float = q.shape[-1] ** -0.5 if scale is None else scale
        return self.attention_sites.attend(q, k, v, mask=None, scale=factor, is_causal=is_causal)[0]


def _by_device(
    functions: SiteFunctions, operand: Tensor, weight: Tensor | None, meet: Any, as_stored: bool = False
) -> Tensor:
    """`meet(operand, weight, first_sequence)` with the weight a virtual device loads, or its stored tensors.

    `operand` is the part of the batch that begins with sequence `first_sequence` of it.
    """
    if not functions.holds("weight"):
        return meet(operand, weight, 0)
    stored = functions.encode(weight, "weight")

    def loaded(first_sequence: int) -> Any:
        if as_stored:
            return functions.faulty(stored, "weight", first_sequence)
        return functions.weight(stored, weight, "weight", first_sequence)

    pieces = functions.context.pieces(operand.shape[0]) if functions.is_faulty("weight") else 1
    if pieces == 1:
        return meet(operand, loaded(0), 0)
    size = operand.shape[0] // pieces
    parts = enumerate(operand.split(size))
    return torch.cat([meet(part, loaded(index * size), index * size) for index, part in parts])


_CLASSES: dict[tuple[type, type], type] = {}


def reclass(module: nn.Module, mixin: type) -> None:
    """Give `module` the class of `mixin` over its own."""
    original = type(module)
    key = (mixin, original)
    if key not in _CLASSES:
        _CLASSES[key] = type(f"Transformed{original.__name__}", (mixin, original), {})
    module.__class__ = _CLASSES[key]


def restore_class(module: nn.Module) -> None:
    """Undo `reclass`."""
    original = {made: original for (_, original), made in _CLASSES.items()}
    module.__class__ = original[type(module)]
