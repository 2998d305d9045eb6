"""ReLoRA on packed ternary weights: killed at every phase of a merge, on one rank and on two, nothing is lost."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from pipeline_lib.artifacts.files import read_json
from pipeline_lib.training.checkpoints import fault_of, newest_good
from tests.training_bench import Bench, Case, Sabotage, metrics

pytestmark = pytest.mark.slow

TERNARY: list[dict[str, Any]] = [{"type": "ternary", "granularity": "row"}]
LINEARS = 2 * 7
MERGE = 2 * LINEARS + 1
"""Places that a rank passes in a merge: new rows and new base of each layer, then the optimizer."""
PHASES = {
    "before the first layer": 1,
    "between two layers": LINEARS + 2,
    "a base half loaded": LINEARS + 1,
    "before the optimizer's restart": MERGE,
    "before the master weights are written": MERGE + 1,
    "in the second merge": MERGE + 1 + MERGE // 2,
    "in the last merge, for export": 2 * (MERGE + 1) + 3,
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    made = Bench(Case("relora", "llama"), tmp_path_factory.mktemp("relora"))
    made._finished = {"reference": fresh(made, "reference"), "reference-of-two": fresh(made, "two")}
    assert made.run(made.reference) == [0]
    assert made.run(made.reference_of_two, world=2) == [0, 0]
    return made


def fresh(bench: Bench, name: str) -> Path:
    return bench.fresh(name, transform=TERNARY)


@pytest.mark.parametrize("phase", PHASES)
def test_killed_in_a_merge(bench: Bench, phase: str) -> None:
    work = fresh(bench, phase.replace(" ", "-").replace(",", ""))
    assert bench.run(work, Sabotage("kill", "merge", PHASES[phase])) == [-signal.SIGKILL]
    assert bench.run(work) == [0]
    bench.same_result(work, bench.reference)


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 6])
def test_killed_while_a_checkpoint_with_a_merge_reaches_the_disk(bench: Bench, number: int) -> None:
    """Its files one by one, the directory, the seal: what is not sealed is not used."""
    work = fresh(bench, f"write-{number}")
    assert bench.run(work, Sabotage("kill", "write", number)) == [-signal.SIGKILL]
    newest = newest_good(work / "checkpoints")
    assert newest is None or not fault_of(newest)
    assert bench.run(work) == [0]
    bench.same_result(work, bench.reference)


def test_one_of_two_ranks_is_killed_in_a_merge(bench: Bench) -> None:
    work = fresh(bench, "one-of-two")
    codes = bench.run(work, Sabotage("kill", "merge", MERGE + 2, rank=1), world=2)
    assert codes[1] == -signal.SIGKILL
    assert codes[0] not in (0, None), "the other cannot finish alone"
    assert bench.run(work, world=2) == [0, 0]
    bench.same_result(work, bench.reference_of_two)


def test_two_ranks_compute_what_one_does_and_each_writes_its_rows(bench: Bench) -> None:
    """In the source all processes wrote the same files."""
    for one, two in zip(metrics(bench.reference), metrics(bench.reference_of_two), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=2e-4)
    newest = newest_good(bench.reference_of_two / "checkpoints")
    assert newest is not None
    files = sorted(newest.glob("masters-*"))
    assert [path.name for path in files] == [f"masters-0000{rank}-of-00002.safetensors" for rank in (0, 1)]
    shapes = []
    for path in files:
        with safe_open(path, "pt") as file:
            shapes.append({name: file.get_slice(name).get_shape() for name in file.keys()})  # noqa: SIM118
    assert len(shapes[0]) == LINEARS
    assert shapes[0]["model.layers.0.mlp.up_proj"] == shapes[1]["model.layers.0.mlp.up_proj"] == [24, 32]


def test_two_ranks_go_on_as_one(bench: Bench) -> None:
    work = fresh(bench, "shrunk")
    assert bench.run(work, Sabotage("term", "batch", 5, rank=1), world=2) == [75, 75]
    assert bench.run(work) == [0]
    for mixed, one in zip(metrics(work), metrics(bench.reference), strict=True):
        assert mixed["loss"] == pytest.approx(one["loss"], rel=2e-4), one["step"]


def test_each_checkpoint_has_the_masters_of_its_own_step(bench: Bench) -> None:
    """The source kept one file a layer outside of all checkpoints, and wrote it anew whenever a model was built."""
    work = bench.fresh("every-step", transform=TERNARY, checkpoint_every=1, keep_checkpoints=3)
    assert bench.run(work) == [0]
    bench.same_result(work, bench.reference)
    found = sorted(work.glob("checkpoints/step-*"))
    assert [path.name for path in found] == ["step-000004", "step-000005", "step-000006"], "older ones fill no disk"
    assert [read_json(path / "state.json")["hooks"]["merges"] for path in found] == [2, 2, 2]
    rows = {}
    for path in [*found, newest_good(bench.reference_of_two / "checkpoints")]:
        assert path is not None
        assert not fault_of(path)
        with safe_open(path / sorted(p.name for p in path.glob("masters-*"))[0], "pt") as file:
            rows[path] = file.get_tensor("model.layers.1.mlp.up_proj")[:24]
    first, *others = rows.values()
    assert all(torch.allclose(first, other, atol=1e-6) for other in others), "no merge after step 4"
    stopped = bench.fresh("stopped-early", transform=TERNARY, checkpoint_every=1, keep_checkpoints=3)
    assert bench.run(stopped, Sabotage("kill", "batch", 4 * 3 + 1)) == [-signal.SIGKILL]
    older = newest_good(stopped / "checkpoints")
    assert older is not None
    assert (older.name, read_json(older / "state.json")["hooks"]["merges"]) == ("step-000003", 1)
    with safe_open(older / "masters-00000-of-00001.safetensors", "pt") as file:
        assert not torch.equal(file.get_tensor("model.layers.1.mlp.up_proj")[:24], first)


def test_starting_from_a_model_keeps_what_has_no_adapter(bench: Bench) -> None:
    """The source drew the embedding anew when it was given a trained model."""
    from safetensors.torch import load_file

    bench.inputs["init"] = bench.root / "init"
    try:
        work = bench.fresh("from-a-model", transform=TERNARY, recipe={"lr": 1e-12})
    finally:
        del bench.inputs["init"]
    assert bench.run(work) == [0]
    before, after = load_file(bench.root / "init" / "model.safetensors"), load_file(work / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert (after[name] - value).abs().max() < 1e-6, name


def test_the_log_accounts_for_memory(bench: Bench) -> None:
    line = metrics(bench.reference)[-1]
    parts = ("weights", "adapters", "gradients", "optimizer", "activations")
    assert line["mem_stated_mib"] == pytest.approx(sum(line[f"mem_{part}_mib"] for part in parts), abs=0.01)
    assert 0 < line["mem_adapters_mib"] < line["mem_optimizer_mib"]
    linears = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32)
    assert line["mem_host_mib"] == pytest.approx(4 * linears / 2**20, abs=1e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains(bench: Bench, precision: str) -> None:
    work = bench.fresh(precision, transform=TERNARY, recipe={"precision": precision})
    assert bench.run(work) == [0]
    for half, full in zip(metrics(work), metrics(bench.reference), strict=True):
        assert half["loss"] == pytest.approx(full["loss"], rel=2e-2), full["step"]


@pytest.mark.parametrize(
    ("transform", "recipe"),
    [
        (TERNARY, {"optimizer_reset": "all", "schedule": "published"}),
        ([], {"optimizer_reset": "pruned", "base": "bf16"}),
    ],
    ids=["all", "pruned"],
)
def test_other_restarts_go_on_after_a_kill_and_on_two_ranks(
    bench: Bench, transform: list[dict[str, Any]], recipe: dict[str, Any]
) -> None:
    """With nothing left of the optimizer, or moments of shards pruned as those of the whole; beside a bf16 base."""
    how = recipe["optimizer_reset"]
    whole, killed, two = (bench.fresh(f"{how}-{name}", transform, recipe) for name in ("whole", "killed", "two"))
    assert bench.run(whole) == [0]
    assert bench.run(killed, Sabotage("kill", "batch", 4 * 4 + 1)) == [-signal.SIGKILL]
    assert bench.run(killed) == [0]
    bench.same_result(killed, whole)
    assert bench.run(two, world=2) == [0, 0]
    for one, both in zip(metrics(whole), metrics(two), strict=True):
        assert one["loss"] == pytest.approx(both["loss"], rel=2e-4), one["step"]
