"""Bit flips as faults at sites."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline_lib.config.errors import UserError
from pipeline_lib.numerics.bitflips import FlipPlan, flip, plan_for
from pipeline_lib.transforms.base import Draw, Fault, Site, Transform
from pipeline_lib.transforms.bitflip.settings import Memory, Operand, Settings
from pipeline_lib.transforms.compose import StraightThrough

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.uint8, torch.int16, torch.int32)
"""Dtypes that can be held in faulty memory. Floats have two groups of bits, the codes of integer stores one."""
_NO_FLIPS = {dtype: plan_for(dtype, 0.0) for dtype in DTYPES}
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32}


class BitFlips(Fault):
    """The flips and stuck bits of one site, by role.

    Plans are made beforehand, since `torch.compile` traces the call.
    """

    def __init__(self, operands: dict[str, Operand], chip_seed: int = 0, shared_input: bool = False) -> None:
        self.roles = frozenset(operands)
        self._plans = {role: _plans(operand) for role, operand in operands.items()}
        self._highest = {role: max(map(int, operand.bits), default=0) for role, operand in operands.items()}
        self._thresholds = {role: operand.zero_out for role, operand in operands.items()}
        self._stuck = {role: _stuck_plans(operand) for role, operand in operands.items() if _is_stuck(operand)}
        self.chip_seed = chip_seed if self._stuck else None
        self.one_memory = operands["input"].model_dump_json() if shared_input and "input" in operands else None

    def __call__(self, tensor: Tensor, role: str, draw: Draw) -> Tensor:
        """`tensor` with the flips of its rows and elements and what is stuck in their memory, gated by the zero-out
        threshold if it is of floats. The gradient passes the faults unchanged, and the gate where it is open."""
        plan = self._plans[role].get(tensor.dtype)
        if plan is None and tensor.dtype in DTYPES:
            raise UserError(
                f"{tensor.dtype} has no bit {self._highest[role]}",
                where=f"transform bitflip: {role}.bits",
                value=self._highest[role],
                allowed=f"0 to {8 * tensor.dtype.itemsize - 1}",
                fix="name bits that the dtype of the model has",
            )
        if plan is None:
            raise UserError(
                "bits of this dtype cannot flip",
                value=str(tensor.dtype),
                allowed=(str(dtype) for dtype in self._plans[role]),
                fix="run the model in float32, bfloat16 or float16",
            )
        threshold = self._thresholds[role] if tensor.dtype.is_floating_point else None
        where = (draw.first_row, draw.first_element)
        if role not in self._stuck:
            return flip(tensor, plan, draw.key, *where, threshold=threshold)
        flipped = flip(tensor, plan, draw.key, *where)
        stuck = StraightThrough.apply(flipped, _read_stuck(flipped.detach(), self._stuck[role], draw))
        return flip(stuck, _NO_FLIPS[tensor.dtype], draw.key, *where, threshold=threshold)


class BitFlip(Transform):
    """Random bit flips of operands."""

    settings: Settings

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.kinds = settings.kinds()  # type: ignore[misc]  # only where an operand is named: patterns see no others

    def fault(self, site: Site) -> Fault | None:
        """The flips of the operands that the settings name for this kind of site."""
        operands = self.settings.operands(site.kind)
        return BitFlips(operands, self.settings.chip_seed, self.settings.shared_input) if operands else None


def _plans(operand: Operand) -> dict[torch.dtype, FlipPlan]:
    """The plan for each dtype that has the bits which the operand names."""
    bits = {int(bit): p for bit, p in operand.bits.items()}
    fitting = [dtype for dtype in DTYPES if all(bit < 8 * dtype.itemsize for bit in bits)]
    return {dtype: plan_for(dtype, operand.p, operand.p_exp, operand.p_frac, bits) for dtype in fitting}


def _is_stuck(operand: Operand) -> bool:
    return isinstance(operand, Memory) and operand.is_stuck


def _stuck_plans(operand: Operand) -> dict[int, tuple[FlipPlan, FlipPlan]]:
    """By bytes of an element: the maps of bits stuck at 0, and of those that are stuck at 1 unless they are at 0."""
    assert isinstance(operand, Memory)
    at_0, at_1 = operand.stuck_at_0, operand.stuck_at_1
    at_1 = min(at_1 / (1 - at_0), 1.0) if at_1 else 0.0
    return {size: (plan_for(dtype, at_0), plan_for(dtype, at_1)) for size, dtype in _INTEGERS.items()}


def _read_stuck(tensor: Tensor, plans: dict[int, tuple[FlipPlan, FlipPlan]], draw: Draw) -> Tensor:
    """`tensor` [1, …] as memory with stuck bits gives it: (bits | stuck at 1) & ~stuck at 0."""
    assert draw.chip is not None
    size = tensor.dtype.itemsize
    bits = tensor.contiguous().view(_INTEGERS[size])
    # The two maps of virtual device d are rows 2d and 2d + 1 of the chip's stream.
    at_0, at_1 = (
        flip(torch.zeros_like(bits), plan, draw.chip, 2 * draw.first_row + i, draw.first_element)
        for i, plan in enumerate(plans[size])
    )
    return ((bits | at_1) & ~at_0).view(tensor.dtype)
