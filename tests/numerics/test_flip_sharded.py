"""Bit flips of tensors that are cut over ranks: on every placement the flips of the whole tensor."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from pipeline_lib.numerics import flip_sharded
from pipeline_lib.numerics.bitflips import flip, plan_for

PLACEMENTS: tuple[tuple[Placement, ...], ...] = (
    (Shard(0), Shard(1)),
    (Shard(1), Replicate()),
    (Replicate(), Shard(2)),
    (Shard(2), Shard(1)),
    (Shard(1), Shard(1)),
)
SHAPE = (3, 7, 50)  # nothing divides evenly
PLAN = plan_for(torch.float32, 0.0, 0.05, 0.3)
WHERE = (torch.tensor(2**33 + 1), torch.tensor(8100))


def whole(threshold: float | None) -> tuple[Tensor, ...]:
    """A tensor and a gradient from above; the tensor flipped on one device, and its gradient."""
    torch.manual_seed(0)
    x, upstream = torch.randn(SHAPE), torch.randn(SHAPE)
    leaf = x.clone().requires_grad_()
    y = flip(leaf, PLAN, torch.tensor(7), *WHERE, threshold=threshold)
    y.backward(upstream)
    assert leaf.grad is not None
    return x, upstream, y.detach(), leaf.grad


def problems() -> list[str]:
    """Placements on which this rank sees other flips or gradients than one device."""
    mesh = dist.init_device_mesh("cpu", (2, 2))
    found = []
    for threshold in (None, 2.0):
        x, upstream, expected, gradient = whole(threshold)
        for placements in PLACEMENTS:
            leaf = distribute_tensor(x, mesh, placements).requires_grad_()
            y = flip(leaf, PLAN, torch.tensor(7), *WHERE, threshold=threshold)
            assert isinstance(y, DTensor)
            y.backward(distribute_tensor(upstream, mesh, y.placements))
            assert leaf.grad is not None
            if not torch.equal(y.full_tensor().view(torch.int32), expected.view(torch.int32)):
                found.append(f"{placements}, {threshold}: flips")
            if not torch.equal(leaf.grad.full_tensor(), gradient):
                found.append(f"{placements}, {threshold}: gradient")
            if y.placements != placements:
                found.append(f"{placements}, {threshold}: placements {y.placements}")
        summand = x if mesh.get_coordinate()[0] == 0 else torch.zeros_like(x)  # type: ignore[index]
        partial = DTensor.from_local(summand, mesh, [Partial(), Replicate()], run_check=False)
        y = flip(partial, PLAN, torch.tensor(7), *WHERE, threshold=threshold)
        if not torch.equal(y.full_tensor().view(torch.int32), expected.view(torch.int32)):
            found.append(f"partial, {threshold}: flips")
    return found


def rank(number: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=number, world_size=4)
    torch.set_num_threads(1)
    Path(folder, f"own-{number}.txt").write_text("\n".join(problems()))
    # A mutant that takes shares of the last dimension for one run of elements.
    flip_sharded._is_window = lambda x, dim: True
    Path(folder, f"mutant-{number}.txt").write_text("\n".join(problems()))
    dist.destroy_process_group()


def test_every_placement_flips_like_the_whole(tmp_path: Path) -> None:
    mp.spawn(rank, args=(str(tmp_path),), nprocs=4)  # type: ignore[attr-defined]
    assert [path.read_text() for path in tmp_path.glob("own-*.txt")] == [""] * 4
    assert "(Replicate(), Shard(dim=2)), None: flips" in Path(tmp_path, "mutant-0.txt").read_text()
