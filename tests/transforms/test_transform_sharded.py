"""A transformed model under FSDP2: state is sharded, prepared and used as on one device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transform_toys.models import logits, materialise, titan

from pipeline_lib.models.naming import canonical_titan
from pipeline_lib.transforms.apply import Applied, apply
from pipeline_lib.transforms.state import transform_state, whole

ENTRIES = [
    {"type": "toy_store", "levels": 100},
    {"type": "toy_fault"},
    {"type": "toy_compute", "gain": 1.5, "sites": {"kv:*": None, "*": {}}},
]


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[dist.device_mesh.DeviceMesh]:
    """One process: FSDP2 still shards, gathers and re-classes."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def build(mesh: dist.device_mesh.DeviceMesh | None) -> tuple[torch.nn.Module, Applied]:
    model = titan()
    applied = apply(model, ENTRIES, seed=0, canonical=canonical_titan, global_batch=8, fault_devices=2)
    if mesh is not None:
        for block in model.layers.values():
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    materialise(model)
    applied.prepare()
    return model, applied


def test_sharded_equals_whole(mesh: dist.device_mesh.DeviceMesh, tokens: Tensor) -> None:
    results = []
    for on in (None, mesh):
        model, applied = build(on)
        applied.context.begin(3, 0)
        output = logits(model, tokens)
        output.square().mean().backward()
        results.append((output, {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}))
    (one, one_grads), (two, two_grads) = results
    assert torch.equal(one, two)
    assert one_grads.keys() == two_grads.keys()
    assert any(".transform.compute.gain" in name for name in one_grads)
    for name, grad in one_grads.items():
        assert torch.allclose(grad, two_grads[name], atol=1e-6), name
    state = transform_state(build(mesh)[0])
    assert all(isinstance(tensor, DTensor) == name.endswith("gain") for name, tensor in state.items())
