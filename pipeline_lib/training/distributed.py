"""The few things the engines ask of torch.distributed; all of them work without a process group too."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist


def device() -> torch.device:
    """This rank's device: its GPU, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return torch.device("cpu")


def start() -> None:
    """Join the process group that the launcher's environment variables describe (none when it set none)."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        where = device()
        if where.type == "cuda":
            torch.cuda.set_device(where)
        dist.init_process_group("cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo")


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def world() -> int:
    """Number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's rank, 0 when alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def barrier() -> None:
    """Wait for all ranks."""
    if world() > 1:
        total([0.0])  # an all-reduce: unlike dist.barrier it needs no device ids


def total(values: list[float]) -> list[float]:
    """Sums over all ranks, in float64; every rank gets the same numbers."""
    if world() == 1:
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64, device=_collective_device())
    dist.all_reduce(sums)
    return sums.tolist()


def gathered(values_N: torch.Tensor) -> torch.Tensor:
    """Every rank's values, as many from each, one rank after another; on the CPU, the same on every rank."""
    if world() == 1:
        return values_N.cpu()
    own = values_N.to(_collective_device())
    parts = [torch.empty_like(own) for _ in range(world())]
    dist.all_gather(parts, own)
    return torch.cat(parts).cpu()


def any_rank(flag: bool) -> bool:
    """Whether `flag` holds on any rank."""
    return total([float(flag)])[0] > 0


def from_first(value: Any) -> Any:
    """Rank 0's `value` (picklable, small) on every rank."""
    if world() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=_collective_device())
    return box[0]


def _collective_device() -> torch.device:
    # The default group may be NCCL only (torchtitan's is); then collectives want GPU tensors.
    return device() if "nccl" in str(dist.get_backend()) else torch.device("cpu")
