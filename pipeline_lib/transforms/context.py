"""Where in the fault streams a forward pass stands: seed, step, sequences, virtual devices."""

from __future__ import annotations

from collections.abc import Callable
from math import gcd

import torch
from torch import Tensor

from pipeline_lib.config.errors import UserError
from pipeline_lib.numerics.streams import site_key, step_key
from pipeline_lib.transforms.base import Draw


class FaultContext:
    """What random faults depend on beside their site. One for each transformed model.

    Call `begin` before every forward pass of a (micro-)batch and change nothing until its backward pass is done:
    recomputation under activation checkpointing then draws the same faults. Everything that changes between passes
    is a 0-d int64 tensor, which `torch.compile` does not specialise on. The tensors are replaced, never written to,
    so that a backward pass may come late.

    Attributes:
        step, first_sequence, position: 0-d int64.
        global_batch: sequences of a step over all ranks and micro-batches.
        fault_devices: virtual devices, equal shares of the global batch; each draws its own weight faults.
    """

    def __init__(self, seed: int, global_batch: int = 1, fault_devices: int = 1) -> None:
        self.seed = seed
        self.global_batch = global_batch
        self.fault_devices = fault_devices
        self.tokens: int | None = None
        self._streams: dict[tuple[str, str], int] = {}
        self._site_keys: list[int] = []
        self._chips: dict[int, int] = {}  # keys that no step changes, by stream
        self._chip_keys: dict[int, Tensor] = {}
        self._at_step: int | None = None
        self._keys = torch.zeros(0, dtype=torch.int64)
        self._where: Callable[[], torch.device] = lambda: torch.device("cpu")
        self._grain = 0
        self.share(global_batch, fault_devices)
        self.step = self.first_sequence = self.position = torch.zeros((), dtype=torch.int64)

    def share(self, global_batch: int, fault_devices: int) -> None:
        """Set the size of the global batch and the number of virtual devices it is divided among.

        Raises:
            UserError: the devices' shares are not equal.
        """
        if fault_devices < 1 or global_batch < 1 or global_batch % fault_devices:
            raise UserError(
                "fault_devices must divide the global batch",
                value=fault_devices,
                allowed=f"the divisors of {global_batch}",
                fix="change fault_devices or the global batch",
            )
        self.global_batch, self.fault_devices = global_batch, fault_devices
        self._grain = global_batch // fault_devices

    def reseed(self, seed: int) -> None:
        """Use the streams of another seed from the next `begin` on."""
        self.seed = seed
        self._at_step = None

    def stream(self, site: str, role: str, chip_seed: int | None = None) -> int:
        """The number of the stream of (site, role) in this context; the same for the same names.

        With a chip seed the draws of the stream have the key of its persistent faults, too.
        """
        self._at_step = None
        stream = self._streams.setdefault((site, role), len(self._streams))
        if chip_seed is not None:
            self._chips[stream] = site_key(chip_seed, site, f"{role} chip")
        return stream

    def on(self, where: Callable[[], torch.device]) -> None:
        """Put the tensors of the next `begin` on the device that `where` then gives."""
        self._where = where

    def begin(self, step: int | Tensor, first_sequence: int, position: int = 0) -> None:
        """Announce a forward pass.

        Args:
            step: optimizer step; 0 in evaluation.
            first_sequence: index of the batch's first sequence in the global batch of the step; in evaluation its index
                in the whole evaluation.
            position: index of the first token of the pass in its sequence; beyond 0 only with a KV cache.
        """
        device = self._where()
        device = torch.device("cpu") if device.type == "meta" else device
        self.step = _number(step, device)
        self.first_sequence = _number(first_sequence, device)
        self.tokens = None
        self.move(position)
        # A weight's batch is cut so that no piece lies on two virtual devices, wherever batches begin; the grain
        # settles within the first steps, so compiled code is not specialised on where a batch begins.
        self._grain = gcd(self._grain, first_sequence)
        self._draw_keys(int(step), device)

    def _draw_keys(self, step: int, device: torch.device) -> None:
        """The key of every stream at once and on the host, so that a forward pass only picks its own."""
        if self._at_step is None:
            self._site_keys = [site_key(self.seed, site, role) for site, role in self._streams]
        if step != self._at_step or self._keys.device != device:
            at = torch.tensor(step, dtype=torch.int64)
            keys = [step_key(key, at) for key in self._site_keys]
            self._keys = _sent(torch.stack(keys), device) if keys else torch.zeros(0, dtype=torch.int64, device=device)
            self._chip_keys = {stream: _number(key, device) for stream, key in self._chips.items()}
            self._at_step = step

    def move(self, position: int | Tensor, tokens: int | None = None) -> None:
        """Set the position alone, for the next token of the same sequences.

        Args:
            position: index of the pass's first token in its sequence.
            tokens: tokens of the pass; tells where the last ones stand when a layer sees only those.
        """
        self.position = _number(position, self.step.device)
        self.tokens = tokens

    def pieces(self, batch: int) -> int:
        """Into how many equal pieces a batch is cut so that each lies within one virtual device."""
        return 1 if self.fault_devices == 1 else batch // gcd(batch, self._grain)

    def activation(self, stream: int, like: Tensor, first_element: Tensor | int = 0) -> Draw:
        """The draw of an activation [sequences, …]."""
        first = _number(first_element, self.step.device)
        return _on(Draw(self._key(stream), self.first_sequence, first, self._chip_keys.get(stream)), like.device)

    def result(
        self, stream: int, like: Tensor, first_vector: Tensor | int, strides: tuple[int, ...], first_sequence: int = 0
    ) -> Draw:
        """The draw of what a compute makes of operands like `like`, from sequence `first_sequence` of the batch on."""
        first = _number(first_vector, self.step.device)
        row = self.first_sequence + first_sequence
        return _on(Draw(self._key(stream), row, first, None, self.step, strides), like.device)

    def weight(self, stream: int, like: Tensor, first_sequence: int = 0) -> Draw:
        """The draw of a weight [1, …] for the virtual device of a sequence of the batch."""
        if self.fault_devices == 1:
            row = torch.zeros_like(self.step)
        else:
            sequence = (self.first_sequence + first_sequence) % self.global_batch
            row = sequence * self.fault_devices // self.global_batch
        zero = torch.zeros_like(self.step)
        return _on(Draw(self._key(stream), row, zero, self._chip_keys.get(stream)), like.device)

    def _key(self, stream: int) -> Tensor:
        if stream >= len(self._keys):
            raise RuntimeError("FaultContext.begin(step, first_sequence) must be called before a forward pass")
        return self._keys[stream]


def _number(value: int | Tensor, device: torch.device) -> Tensor:
    """A 0-d int64 tensor; of an integer by a fill, since a copy would wait for all work of the device."""
    if isinstance(value, Tensor):
        return value.to(device, torch.int64)
    return torch.full((), value, dtype=torch.int64, device=device)


def _sent(keys: Tensor, device: torch.device) -> Tensor:
    """`keys` on the device, behind the work that it still has."""
    return keys.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else keys.to(device)


def _on(draw: Draw, device: torch.device) -> Draw:
    if draw.key.device == device or device.type == "meta":
        return draw
    moved = {name: value.to(device) for name, value in draw._asdict().items() if isinstance(value, Tensor)}
    return draw._replace(**moved)
