"""Bit flips of a DTensor: every rank flips what it holds, as that part of the whole tensor flips on one device."""

from __future__ import annotations

from math import prod

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from pipeline_lib.numerics.flip_plan import FlipPlan


def flip_sharded(
    x: DTensor, plan: FlipPlan, key: Tensor, row: Tensor, element: Tensor, threshold: float | None
) -> DTensor:
    """`bitflips.flip` of a DTensor [rows, elements...], in the same placements.

    A part that is one window of the stream is flipped where it is: whole rows, or in each row one run of elements, as
    of tensors sharded by their first or second dimension. Other tensors, and sums that are still partial, are gathered
    first and cut again after.
    """
    from pipeline_lib.numerics.bitflips import flip

    mesh, wanted = x.device_mesh, x.placements
    readable = [p if type(p) is Shard and _is_window(x, p.dim) else Replicate() for p in wanted]
    held = x.redistribute(placements=readable)
    _, offset = compute_local_shape_and_global_offset(x.shape, mesh, readable)
    first_row = row + offset[0]
    first_element = element + (offset[1] * prod(x.shape[2:]) if x.dim() > 1 else 0)
    local = flip(held.to_local(), plan, key, first_row, first_element, threshold=threshold)
    strides = tuple(prod(x.shape[i + 1 :]) for i in range(x.dim()))
    out = DTensor.from_local(local, mesh, readable, run_check=False, shape=x.shape, stride=strides)
    cut = [Replicate() if p.is_partial() else p for p in wanted]
    return out.redistribute(placements=cut)


def _is_window(x: DTensor, dim: int) -> bool:
    """Whether a share along `dim` is one run of elements in each row (or a run of rows)."""
    return dim % x.dim() <= 1
