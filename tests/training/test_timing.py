"""Stage `timing`: every pass that a training can make, as a reference for budgets, and where it stands in the DAG."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline_lib.artifacts.files import read_json
from pipeline_lib.config.errors import UserError
from pipeline_lib.config.models import count_parameters
from pipeline_lib.config.plan import Plan
from pipeline_lib.config.timing import READS
from pipeline_lib.stages import timing
from pipeline_lib.training.timing import KINDS, filled
from tests.config.test_errors import BASE
from tests.training.cram_bench import Bench, method, result


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("timing"))


@pytest.mark.parametrize("shape", ["crammed", "llama"])
def test_every_pass_is_measured_and_buys_work(bench: Bench, shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline_lib.training import timing as measured

    monkeypatch.setattr(measured, "SECONDS", 3.0)
    job = bench.job(f"timing-{shape}", shape)
    inputs = {"tokenizer": bench.inputs["tokenizer"]}
    settings = {**job.settings, "recipe": {key: job.settings["recipe"][key] for key in READS}}
    timing.run(dataclasses.replace(job, stage="timing", inputs=inputs, settings=settings))
    found = read_json(job.out / "timing.json")
    assert found["result"] == {"kinds": list(KINDS), "layers": 4}, "the same on every machine"
    seconds = found["provenance"]["seconds"]
    assert {kind: list(depths) for kind, depths in seconds.items()} == {kind: ["1", "2", "3", "4"] for kind in KINDS}
    assert all(0 < value < 1 for depths in seconds.values() for value in depths.values())
    assert 0 < found["provenance"]["flops_reference_per_second"] < 1

    hours = 8 * 6.5 * seconds["train"]["4"] / 3600
    job = bench.job(f"here-{shape}", shape, budget={"rst_hours": hours, "reference": "measured"})
    bench.inputs["timing"] = bench.root / f"timing-{shape}" / "out"
    assert (
        result(bench.train(f"here-{shape}", shape, budget={"rst_hours": hours, "reference": "measured"}))["steps"] == 7
    )
    there = {"rst_hours": hours, "reference": str(bench.inputs.pop("timing") / "timing.json")}
    listed = [method("layer-dropping"), method("selective-backprop")]
    assert result(bench.train(f"there-{shape}", shape, budget=there))["steps"] == 7
    assert result(bench.train(f"methods-{shape}", shape, budget=there, methods=listed))["rst_hours"] >= hours


def test_a_slow_machine_times_fewer_depths() -> None:
    assert filled({1: 1.0, 3: 2.0, 4: 2.5}, 4) == {1: 1.0, 2: 1.5, 3: 2.0, 4: 2.5}
    assert filled({1: 0.25}, 1) == {1: 0.25}


def plan(tmp_path: Path, **experiments: Any) -> Plan:
    entries = {name: {"model": "bert-nano", "recipe": {"cram": recipe}} for name, recipe in experiments.items()}
    config = {**BASE, "experiments": {"other": {"model": "nano"}, **entries}, "tables": {}, "sweeps": {}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return Plan.load(str(tmp_path / "config.yaml"))


def test_its_place_in_the_dag(tmp_path: Path) -> None:
    measured = {"rst_hours": 1e-5, "reference": "measured"}
    made = plan(
        tmp_path,
        a={},
        b={"budget": measured, "methods": ["layer-dropping"], "valid_every": 1e-6},
        c={"precision": "bf16"},
    )
    nodes = {name: made.view(f"results/{name}/timing.json")[0] for name in "abc"}
    assert nodes["a"].id == nodes["b"].id, "budget and methods are no part of speed"
    assert nodes["c"].id != nodes["a"].id
    trainings = {name: made.resolver.train(made.resolver.experiments.get(name)) for name in "ab"}
    assert trainings["b"].inputs["timing"].id == nodes["b"].id
    assert "timing" not in trainings["a"].inputs, "a reference of its own does not wait for this machine"
    assert trainings["b"].execution["recipe"] == {"valid_every": 1e-6}, "how it runs, and no part of the fingerprint"
    with pytest.raises(UserError, match="recipe pretrain counts no work"):
        made.view("results/other/timing.json")


def test_what_text_a_budget_takes_is_known_or_said(tmp_path: Path) -> None:
    """Of a source fetched in part; and whole passes of methods that leave layers out take more."""
    unset = {"rst_hours": None, "reference": "rtx3090"}
    made = plan(tmp_path, a={"budget": {"flops": 1e12, **unset}})
    exp = made.resolver.experiments.get("a")
    parameters = count_parameters(made.resolver.architecture(exp, 64))[1]
    steps = math.ceil(1e12 / (6 * parameters * 32 * 64))
    assert made.resolver.recipe(exp)[1] == math.ceil(1.5 * steps) * 32 * 64
    wall = plan(tmp_path, b={"budget": {"wall_hours": 1, **unset}})
    assert wall.resolver.recipe(wall.resolver.experiments.get("b"))[1] is None
    with pytest.raises(UserError, match="how much text its budget takes"):
        wall.resolver.tokens("c4-subset", wall.resolver.tokenizer("pydocs"), None)
