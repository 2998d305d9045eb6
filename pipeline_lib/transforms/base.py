"""What a transform is made of: sites, the three functions at a site, and the draw a random fault gets.

Imports no torch, so that a transform's settings can be read while planning.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from pipeline_lib.config.base import Settings

if TYPE_CHECKING:
    from torch import Tensor, nn

Kind = Literal["linear", "product", "embedding", "kv"]

ROLES: dict[str, tuple[str, ...]] = {
    "linear": ("weight", "input"),
    "product": ("left", "right"),
    "embedding": ("weight",),
    "kv": ("key", "value"),
}
KINDS: frozenset[str] = frozenset(ROLES)


@dataclass(frozen=True)
class Site:
    """A place where a transform can act.

    Attributes:
        kind: linear (roles weight, input), product (left, right: query·key and probabilities·value),
            embedding (weight) or kv (key, value: the KV cache as attention reads it).
        name: module path in Hugging Face naming, whatever the model in memory calls it; product sites end in
            `.query_key` or `.attention_value`, KV sites in `.kv`.
        shape: of the weight, (out, in) or (rows, features); empty for product and kv.
    """

    kind: Kind
    name: str
    shape: tuple[int, ...] = ()


class Draw(NamedTuple):
    """All that a random fault may depend on: a stream, and where in the stream the tensor lies.

    Attributes:
        key: 0-d int64, the stream of (seed, site, role, stored part, entry of the composition, step).
        first_row: 0-d int64, the row of `tensor[0]`: the sequence's index in the global batch for an activation, the
            virtual device for a weight. `tensor[i]` is row `first_row + i`.
        first_element: 0-d int64, the index within its row of the first element of each `tensor[i]` (not 0 when
            decoding token by token).
        chip: 0-d int64, the stream of (chip seed, site, role, stored part, entry): the same at every step, for what is
            drawn once. None unless the fault has a `chip_seed`.
        step: 0-d int64, the optimizer step; 0 in evaluation. None for faults.
        strides: None for faults. The draw of a compute counts its result [rows, …, features] in vectors of features:
            result[i, j, …] is vector `first_element` + j·strides[0] + … of row `first_row` + i.
    """

    key: Tensor
    first_row: Tensor
    first_element: Tensor
    chip: Tensor | None = None
    step: Tensor | None = None
    strides: tuple[int, ...] | None = None


class Rows(Protocol):
    """A weight whose rows are shared out over processes, in order."""

    def add(self, values: list[float]) -> list[float]:
        """Sums over the processes."""
        ...

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all processes, in order, on every process."""
        ...


class Function:
    """A function at a site, for some of the site's roles. May also be an `nn.Module` when it has state.

    State (parameters, buffers) then lives under `<module>.transform.*`; `prepare` gives it its first values.

    Attributes:
        roles: of the site's operands, those it acts on.
        calibrated: `calibrate` chooses state of a linear site from the layer's inputs.
        observes: the function, a module, has state that it chooses from what it sees in passes; `Transform.settle`
            takes it over.
        observing: set while a calibration runs the exact model: observe, and compute exactly.
    """

    roles: frozenset[str] = frozenset()
    calibrated: bool = False
    observes: bool = False
    observing: bool = False

    def prepare(self, operands: Mapping[str, Tensor]) -> None:
        """Initialise state, once the model has left the meta device.

        Args:
            operands: {"weight": the whole weight} at a linear or embedding, nothing elsewhere. Use
                `state.assign` to write a value to a parameter: it may be sharded.
        """

    def calibrate(self, weight: Tensor, inputs: Tensor) -> tuple[dict[str, Tensor], dict[str, float]]:
        """State that is chosen from what a linear layer sees, and figures for the report of stage `clip`.

        Called for functions that are `calibrated`, of transforms whose module has a `calibration`.

        Args:
            weight: [out, in] fp32, as the layer starts with.
            inputs: [tokens, in] fp32, a sample of the layer's inputs in the exact model.

        Returns:
            Values of this function's parameters or buffers by name, and finite figures by name.
        """
        raise NotImplementedError(type(self).__name__)

    def absorb(self, weight: Tensor) -> Tensor:
        """The weight a training starts with: calibrated state may be worked into it, and reset."""
        return weight


class Store(Function, ABC):
    """How a value is held in memory: value ↔ stored tensors, such as codes and scales.

    Attributes:
        parts: names of the stored tensors, as `encode` gives them.
        exposed: those that faults of the same composition act on; None is all of them.
        in_memory: a linear product is computed where the weight lies: `multiply` gets the stored tensors, after their
            faults, and the weight is never loaded. Such a store leaves no room for a compute at its site.
        straight_through: the loaded value passes its gradient to the value unchanged (and to state that `decode`
            uses). Otherwise autograd goes through `encode` and `decode` themselves.
    """

    parts: tuple[str, ...] = ()
    exposed: tuple[str, ...] | None = None
    in_memory: bool = False
    straight_through: bool = True

    @abstractmethod
    def encode(self, value: Tensor, role: str) -> dict[str, Tensor]:
        """The stored tensors. Of an activation [sequences, positions, …] they keep the leading dimension."""

    @abstractmethod
    def decode(self, stored: dict[str, Tensor], role: str) -> Tensor:
        """The value again, from what faults have left of the stored tensors."""

    def packed(self, role: str) -> dict[str, Tensor] | None:
        """The stored tensors themselves where the store holds them as buffers; then `encode` is not called.

        Each has the weight's rows as its first dimension.
        """
        return None

    @property
    def can_pack(self) -> bool:
        """Whether `pack` is there: whether a frozen weight can be held as its stored tensors alone."""
        return type(self).pack is not Store.pack

    def pack(self, value: Tensor, role: str, rows: Rows | None = None) -> None:
        """Hold the stored tensors of `value` from now on, as buffers that no checkpoint contains; `packed` gives them.

        Args:
            value: the whole value, or the rows of it that this process has.
            rows: gathers over processes; all of them call `pack` alike. None: `value` is whole.
        """
        raise NotImplementedError(f"{type(self).__name__} has no packed form")

    def multiply(self, stored: dict[str, Tensor], input: Tensor, bias: Tensor | None) -> Tensor:
        """input [..., in] -> [..., out]: the linear product from the stored tensors, packed or `in_memory`.

        Of a store that can `pack` it is differentiable with respect to the input; `in_memory`, with respect to the
        stored tensors as well. By default the decoded weight meets the input.
        """
        import torch.nn.functional as F

        return F.linear(input, self.decode(stored, "weight").to(input.dtype), bias)


class Fault(Function, ABC):
    """What happens to a tensor in memory or on the wire.

    Attributes:
        chip_seed: seed of what the fault draws once and not at each step (`Draw.chip`); None if there is nothing.
        one_memory: not None if linear layers that read the same tensor (query, key and value; gate and up) read it from
            one memory: it is then loaded once for all of them, with the draw of the first. Their faults' values must be
            equal: it says, in any form, what happens to that input.
    """

    chip_seed: int | None = None
    one_memory: str | None = None

    @abstractmethod
    def __call__(self, tensor: Tensor, role: str, draw: Draw) -> Tensor:
        """The faulty tensor: same shape and dtype, differentiable where the dtype is.

        Args:
            tensor: [rows, …], any dtype; activations [sequences, positions, features…], a weight [1, …].
            role: one of the site's roles.
            draw: where its randomness comes from; the same draw must give the same faults.
        """


class Compute(Function, ABC):
    """How the operands meet.

    Called, by kind, with and for:
        linear: (input [..., in], weight [out, in], bias [out] or None) -> [..., out]
        product: (left [..., n, k], right [..., k, m]) -> [..., n, m]
        embedding: (ids [...], weight [rows, features]) -> [..., features]
        kv: (query, key, value [sequences, heads, positions, features], mask (True = attend) or None, scale, dropout)
            -> attention output in the shape of the query

    Attributes:
        random: it is called with the keyword `draw` as well, which says where the randomness of its result comes from.
    """

    random: bool = False

    @abstractmethod
    def __call__(self, *operands: Any, **draw: Draw) -> Tensor:
        """The result of the operation."""


class Transform:
    """What imperfect arithmetic does to a model. One instance for each pattern of each entry of a composition.

    A subclass overrides `store`, `fault` and `compute` as far as it has them; each gives the function for one
    site (a new one for each call if it has state) or None. The settings hold the pattern's overrides already.

    Attributes:
        kinds: kinds of sites it can act on; patterns see no others.
    """

    kinds: frozenset[str] = KINDS

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def store(self, site: Site) -> Store | None:
        """How operands are held at this site."""
        return None

    def fault(self, site: Site) -> Fault | None:
        """What happens to what is held at this site."""
        return None

    def compute(self, site: Site) -> Compute | None:
        """How operands meet at this site."""
        return None

    def prepare(self, model: nn.Module) -> None:
        """Called once on the whole model after its weights are there and every function is prepared."""

    def settle(self) -> None:
        """Take over what functions observed since the last call; after each optimizer step, on all ranks alike."""
