"""Where the stage `clip` stands in the DAG, and what its fingerprint depends on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline_lib.config.errors import UserError
from pipeline_lib.config.nodes import Node
from pipeline_lib.config.plan import Plan
from tests.config.test_errors import BASE

TASK = "pydocs"


def plan(tmp_path: Path, **experiments: Any) -> Plan:
    config = {**BASE, "experiments": {"plain-nano": {}, **experiments}, "tables": {}, "sweeps": {}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return Plan.load(str(tmp_path / "config.yaml"))


def checkpoint(made: Plan, name: str) -> Node:
    return made.resolver.checkpoint(made.resolver.experiments.get(name))


def int2(**settings: Any) -> dict[str, Any]:
    return {"from": "plain-nano", "recipe": "none", "transform": {"int2": settings}}


def test_weights_that_are_not_trained_are_calibrated_and_packed(tmp_path: Path) -> None:
    made = plan(tmp_path, x=int2(), rtn=int2(clip=None))
    node = checkpoint(made, "x")
    assert node.stage == "convert"
    clip = node.inputs["clip"]
    assert {role: upstream.stage for role, upstream in clip.inputs.items()} == {
        "init": "convert", "tokenizer": "tokenizer", "text": "dataset",
    }  # fmt: skip
    assert clip.inputs["init"].id == checkpoint(made, "plain-nano").id
    assert checkpoint(made, "rtn").id == checkpoint(made, "plain-nano").id, (
        "nothing to calibrate: the weights as they are"
    )
    arms = made.resolver.arms(made.resolver.experiments.get("x"), TASK)
    assert {arm.inputs["checkpoint"].id for arm in arms.values()} == {node.id}
    assert arms["transformed"].settings["fault_seeds"] == [0], "nothing is random"


def test_a_training_starts_from_calibrated_weights(tmp_path: Path) -> None:
    tuned = {**int2(), "recipe": {"finetune": {"steps": 2}}}
    made = plan(tmp_path, x=tuned, plain={**tuned, "transform": "plain"})
    train = checkpoint(made, "x").inputs["train"]
    assert train.inputs["clip"].inputs["init"].id == train.inputs["init"].id
    assert "clip" not in checkpoint(made, "plain").inputs["train"].inputs


def test_random_weights_are_not_calibrated(tmp_path: Path) -> None:
    made = plan(tmp_path, x={"model": "nano", "recipe": "pretrain", "transform": "int2"})
    assert "clip" not in checkpoint(made, "x").inputs["train"].inputs


def test_weights_trained_under_the_transform_are_not_calibrated_again(tmp_path: Path) -> None:
    tuned = {**int2(), "recipe": {"finetune": {"steps": 2}}}
    flips = {"int2": {}, "bitflip": {"weight": {"p": 1.0e-3}}}
    made = plan(
        tmp_path,
        x=tuned,
        flipped={"from": "x", "transform": flips},
        more={"from": "x", "recipe": {"finetune": {"steps": 3}}, "transform": flips},
        clipped=int2(),
        late={"from": "clipped", "recipe": {"finetune": {"steps": 2}}, "transform": "int2"},
        again={"from": "clipped", "transform": flips},
    )
    assert checkpoint(made, "flipped").id == checkpoint(made, "x").id
    assert "clip" not in checkpoint(made, "more").inputs["train"].inputs
    assert checkpoint(made, "again").id == checkpoint(made, "clipped").id, "its ranges came with the weights"
    assert "clip" in checkpoint(made, "late").inputs["train"].inputs, "only evaluated under it, so still to be clipped"


def test_flips_beside_it_share_the_search(tmp_path: Path) -> None:
    flips = {
        p: {"from": "plain-nano", "transform": {"int2": {}, "bitflip": {"weight": {"p": p}}}} for p in (1e-3, 1e-2)
    }
    made = plan(tmp_path, **{f"x{i}": entry for i, entry in enumerate(flips.values())})
    assert checkpoint(made, "x0").id == checkpoint(made, "x1").id


@pytest.mark.parametrize(
    ("change", "moves"),
    [
        ({"clip": {"grid": 10}}, True),
        ({"group_size": 64}, True),
        ({"clip": {"samples": 64}}, True),
        ({"clip": {"dataset": "wikitext"}}, True),
        ({"clip": {}}, False),
    ],
)
def test_its_settings_are_semantic(tmp_path: Path, change: dict[str, Any], moves: bool) -> None:
    made = plan(tmp_path, x=int2(), y=int2(**change))
    first, second = (checkpoint(made, name).inputs["clip"] for name in "xy")
    assert (first.fingerprint != second.fingerprint) is moves


def test_the_text_can_be_named(tmp_path: Path) -> None:
    made = plan(tmp_path, x=int2(clip={"dataset": "pile-val"}))
    text = checkpoint(made, "x").inputs["clip"].inputs["text"]
    assert text.settings["source"]["repo"] == "mit-han-lab/pile-val-backup"
    with pytest.raises(UserError, match="pile"):
        plan(tmp_path, x=int2(clip={"dataset": "pile"}))
