"""The functions of a composition at one site, run as store → faults → load → compute."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from pipeline_lib.config.errors import UserError
from pipeline_lib.transforms.base import ROLES, Compute, Draw, Fault, Function, Site, Store
from pipeline_lib.transforms.context import FaultContext

WHOLE = "value"  # the one stored part where a composition has no store


class SiteFunctions:
    """What a composition does at a site.

    Args:
        functions: (index of the entry in the composition, function), in the order of the composition.

    Raises:
        UserError: two stores or two computes, or a function for a role that the site does not have.
    """

    def __init__(self, site: Site, functions: Sequence[tuple[int, Function]], context: FaultContext) -> None:
        self.site, self.context = site, context
        stores = [function for _, function in functions if isinstance(function, Store)]
        computes = [function for _, function in functions if isinstance(function, Compute)]
        for name, found in (("store", stores), ("compute", computes)):
            if len(found) > 1:
                raise UserError(
                    f"a composition may have one {name} at a site",
                    where=site.name,
                    value=" and ".join(type(function).__name__ for function in found),
                    fix=f"exclude the site from all but one with `sites: {{{site.name}: null}}`",
                )
        for _, function in functions:
            if not function.roles <= set(ROLES[site.kind]):
                raise UserError(
                    f"{type(function).__name__} acts on roles that a {site.kind} site does not have",
                    where=site.name,
                    value=sorted(function.roles),
                    allowed=ROLES[site.kind],
                    fix="correct the roles of the function",
                )
        self.store = stores[0] if stores else None
        self.compute = computes[0] if computes else None
        if self.store is not None and self.store.in_memory and self.compute is not None:
            raise UserError(
                "a store that multiplies in memory loads no weight for a compute",
                where=site.name,
                value=f"{type(self.store).__name__} and {type(self.compute).__name__}",
                fix=f"exclude the site from one of them with `sites: {{{site.name}: null}}`",
            )
        self.faults = [(index, function) for index, function in functions if isinstance(function, Fault)]
        self._streams = {
            (index, role, part): context.stream(site.name, f"{role}.{part}/{index}", fault.chip_seed)
            for index, fault in self.faults
            for role in sorted(fault.roles)
            for part in self._exposed(role)
        }
        drawing = next(
            (index for index, function in functions if isinstance(function, Compute) and function.random), None
        )
        self._result = None if drawing is None else context.stream(site.name, f"result/{drawing}")

    def stateful(self) -> dict[str, nn.Module]:
        """The functions that have state, by the name under which their module holds it."""
        named = {
            "store": self.store,
            "compute": self.compute,
            **{f"fault{index}": fault for index, fault in self.faults},
        }
        return {name: function for name, function in named.items() if isinstance(function, nn.Module)}

    def functions(self) -> list[Function]:
        """All functions, in the order they run."""
        faults = [fault for _, fault in self.faults]
        return [f for f in (self.store, *faults, self.compute) if f is not None]

    def holds(self, role: str) -> bool:
        """Whether anything happens to this operand before the operands meet."""
        return (self.store is not None and role in self.store.roles) or self.is_faulty(role)

    @property
    def multiplying_store(self) -> Store | None:
        """The store of the weight if the operation reads its stored tensors as they are: packed, or in memory."""
        store = self.store if self.compute is None else None
        if store is None:
            return None
        in_memory = store.in_memory and self.site.kind == "linear" and "weight" in store.roles
        return store if in_memory or store.packed("weight") is not None else None

    def is_faulty(self, role: str) -> bool:
        """Whether a fault acts on this operand."""
        return any(role in fault.roles for _, fault in self.faults)

    @property
    def draws(self) -> bool:
        """Whether anything here depends on where in its sequences a pass stands."""
        return bool(self.faults) or self._result is not None

    def one_memory(self) -> list[tuple[int, str | None]]:
        """What happens to an input that lies in one memory for several linear layers; empty if it does not."""
        found = [(index, fault.one_memory) for index, fault in self.faults if "input" in fault.roles]
        if all(said is None for _, said in found):
            return []
        if self.store is not None and "input" in self.store.roles:
            raise UserError(
                "an input that several layers read from one memory cannot be stored by each of them in its own way",
                where=self.site.name,
                value=type(self.store).__name__,
                fix="set shared_input to false, or exclude the site from the store",
            )
        return found

    def activation(self, value: Tensor, role: str, first_position: Tensor | int = 0) -> Tensor:
        """`value` as it is loaded.

        Args:
            value: [sequences, positions, features…], or [sequences, features] of one position.
            first_position: position of value[:, 0].
        """
        if not self.holds(role):
            return value
        stored = self.encode(value, role)
        positions = value.shape[1] if value.ndim > 2 else None
        for index, fault, part in self._faulty_parts(role):
            tensor = stored[part]
            # Draws count elements position by position, so that a token's own do not depend on what else is there.
            per_position = prod(tensor.shape[2:]) if positions is not None and _has(tensor, positions) else 0
            draw = self.context.activation(self._streams[index, role, part], tensor, first_position * per_position)
            stored[part] = fault(tensor, role, draw)
        return self.decode(value, stored, role)

    def probabilities(self, value: Tensor, role: str, first_position: Tensor | int, span: int) -> Tensor:
        """`activation` for attention probabilities, whose rows grow with the sequence.

        The element (query, key, head) has index (query·span + key)·heads + head in its sequence's row, whatever
        the number of keys present: neither padding nor decoding token by token moves a draw.

        Args:
            value: [sequences, queries, keys, heads].
            first_position: position of value[:, 0].
            span: most positions a sequence can have.
        """
        if not self.holds(role):
            return value
        stored = self.encode(value, role)
        for index, fault, part in self._faulty_parts(role):
            tensor = stored[part]
            stream = self._streams[index, role, part]
            keys = value.shape[2] if tensor.ndim > 2 and _has(tensor, value.shape[1]) else 0
            per_row = prod(tensor.shape[2:])
            if keys and tensor.shape[2] == keys:
                per_row = span * prod(tensor.shape[3:])

            def draw(query: int, stream: int = stream, tensor: Tensor = tensor, per_row: int = per_row) -> Draw:
                return self.context.activation(stream, tensor, (first_position + query) * per_row)

            if per_row == prod(tensor.shape[2:]):
                stored[part] = fault(tensor, role, draw(0))
            elif span <= 4 * keys:
                padded = nn.functional.pad(tensor, (0, 0) * (tensor.ndim - 3) + (0, span - keys))
                stored[part] = fault(padded, role, draw(0))[:, :, :keys]
            else:
                rows = [fault(tensor[:, query], role, draw(query)) for query in range(tensor.shape[1])]
                stored[part] = torch.stack(rows, dim=1)
        return self.decode(value, stored, role)

    def weight(self, stored: dict[str, Tensor], value: Tensor | None, role: str, first_sequence: int = 0) -> Tensor:
        """The weight as the virtual device of sequence `first_sequence` of the batch loads it.

        Args:
            stored: what `encode(value, role)` gave.
            value: None where the store holds it packed.
        """
        return self.decode(value, self.faulty(stored, role, first_sequence), role)

    def faulty(self, stored: dict[str, Tensor], role: str, first_sequence: int = 0) -> dict[str, Tensor]:
        """The stored tensors of a weight as that virtual device has them in memory."""
        faulty = dict(stored)
        for index, fault, part in self._faulty_parts(role):
            tensor = faulty[part].unsqueeze(0)
            draw = self.context.weight(self._streams[index, role, part], tensor, first_sequence)
            faulty[part] = fault(tensor, role, draw).squeeze(0)
        return faulty

    def meet(
        self, *operands: Any, first_vector: Tensor | int = 0, strides: tuple[int, ...] = (), first_sequence: int = 0
    ) -> Tensor:
        """What the compute makes of the operands.

        Args:
            first_vector, strides: see `Draw.strides`.
            first_sequence: of the operands in the batch.
        """
        assert self.compute is not None
        if self._result is None:
            return self.compute(*operands)
        draw = self.context.result(self._result, operands[0], first_vector, strides, first_sequence)
        return self.compute(*operands, draw=draw)

    def encode(self, value: Tensor | None, role: str) -> dict[str, Tensor]:
        """The stored tensors of an operand; {"value": value} where nothing stores it."""
        packed = self.store.packed(role) if self.store is not None and role in self.store.roles else None
        if packed is not None:
            return dict(packed)
        assert value is not None  # only a packed weight leaves its layer without one
        if self.store is None or role not in self.store.roles:
            return {WHOLE: self._as_read(value) if self.is_faulty(role) else value}
        return dict(self.store.encode(value.detach() if self.store.straight_through else value, role))

    def _as_read(self, value: Tensor) -> Tensor:
        """Under autocast, in the dtype that the operation computes in: those are the bits that lie in memory."""
        kind = value.device.type
        if self.site.kind == "embedding" or value.is_meta or not value.is_floating_point():
            return value
        if not torch.is_autocast_enabled(kind):
            return value
        return value.to(torch.get_autocast_dtype(kind))

    def decode(self, value: Tensor | None, stored: dict[str, Tensor], role: str) -> Tensor:
        """The operand from its stored tensors, with its gradient led back to `value`."""
        if self.store is None or role not in self.store.roles:
            return stored[WHOLE]
        loaded = self.store.decode(stored, role)
        if self.store.straight_through and value is not None and value.requires_grad:
            return StraightThrough.apply(value, loaded)
        return loaded

    def _exposed(self, role: str) -> tuple[str, ...]:
        if self.store is None or role not in self.store.roles:
            return (WHOLE,)
        return self.store.parts if self.store.exposed is None else self.store.exposed

    def _faulty_parts(self, role: str) -> list[tuple[int, Fault, str]]:
        return [
            (index, fault, part) for index, fault in self.faults if role in fault.roles for part in self._exposed(role)
        ]


def _has(tensor: Tensor, positions: int) -> bool:
    return tensor.ndim > 1 and tensor.shape[1] == positions


class StraightThrough(torch.autograd.Function):
    """loaded forward; backward, the whole gradient to both the value and whatever `loaded` was computed from."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, loaded: Tensor) -> Tensor:
        return loaded.view_as(loaded)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], gradients[0]
