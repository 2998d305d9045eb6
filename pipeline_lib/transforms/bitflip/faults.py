"""Bit flips as faults at sites."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline_lib.config.errors import UserError
from pipeline_lib.numerics.bitflips import FlipPlan, flip, plan_for
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
        self._thresholds = {role: operand.zero_out for role, operand in operands.items()}

    def __call__(self, tensor: Tensor, role: str, draw: Draw) -> Tensor:
        """`tensor` with the flips of its rows and elements, gated by the zero-out threshold if it is of floats."""
        plan = self._plans[role].get(tensor.dtype)
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
    return {dtype: plan_for(dtype, operand.p, operand.p_exp, operand.p_frac) for dtype in DTYPES}
