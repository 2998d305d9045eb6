"""Bit flips as faults at sites."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline_lib.config.errors import UserError
from pipeline_lib.numerics.bitflips import FlipPlan, flip, make_plan, plan_for
from pipeline_lib.transforms.base import Draw, Fault, Site, Transform
from pipeline_lib.transforms.bitflip.settings import Operand, Settings

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.uint8, torch.int16, torch.int32)
"""Dtypes that can be held in faulty memory. Floats have two groups of bits, the codes of integer stores one."""


class BitFlips(Fault):
    """The flips of one site, by role.

    Plans are made beforehand, since `torch.compile` traces the call.
    """

    def __init__(self, operands: dict[str, Operand]) -> None:
        self.roles = frozenset(operands)
        self._plans = {role: _plans(operand) for role, operand in operands.items()}
        self._highest = {role: max(map(int, operand.bits), default=0) for role, operand in operands.items()}
        self._thresholds = {role: operand.zero_out for role, operand in operands.items()}

    def __call__(self, tensor: Tensor, role: str, draw: Draw) -> Tensor:
        """`tensor` with the flips of its rows and elements, gated by the zero-out threshold if it is of floats."""
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
                allowed=(str(dtype) for dtype in DTYPES),
                fix="run the model in float32, bfloat16 or float16",
            )
        threshold = self._thresholds[role] if tensor.dtype.is_floating_point else None
        return flip(tensor, plan, draw.key, draw.first_row, draw.first_element, threshold=threshold)


class BitFlip(Transform):
    """Random bit flips of operands."""

    settings: Settings

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.kinds = settings.kinds()  # type: ignore[misc]  # only where an operand is named: patterns see no others

    def fault(self, site: Site) -> Fault | None:
        """The flips of the operands that the settings name for this kind of site."""
        operands = self.settings.operands(site.kind)
        return BitFlips(operands) if operands else None


def _plans(operand: Operand) -> dict[torch.dtype, FlipPlan]:
    """The plan for each dtype that has the bits which the operand names."""
    highest = max(map(int, operand.bits), default=0)
    return {dtype: _plan(operand, dtype) for dtype in DTYPES if highest < 8 * dtype.itemsize}


def _plan(operand: Operand, dtype: torch.dtype) -> FlipPlan:
    grouped = plan_for(dtype, operand.p, operand.p_exp, operand.p_frac)
    if not operand.bits:
        return grouped
    masks: dict[float, int] = {}
    for bit in range(grouped.bits):
        groups = zip(grouped.masks, grouped.probabilities, strict=True)
        p = operand.bits.get(str(bit), next(p for mask, p in groups if mask >> bit & 1))
        masks[p] = masks.get(p, 0) | 1 << bit
    return make_plan(grouped.bits, [(mask, p) for p, mask in masks.items()])
