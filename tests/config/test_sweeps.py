"""Sweeps: axes that are settings, axes that have names, and what is refused while planning."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline_lib.config.errors import UserError
from pipeline_lib.config.load import read_yaml
from pipeline_lib.config.plan import Plan
from pipeline_lib.config.sweeps import points
from tests.workflow.clone import ROOT, TINY, write_words

GRID: dict[str, Any] = {
    "p": [0, 0.1],
    "operand": {"weights": "weight", "activations": "input"},
    "layers": {"attention": "*.self_attn.*", "mlp": "*.mlp.*"},
}
SETTINGS = {"transform.bitflip.{operand}.p_frac": "{p}", "transform.bitflip.sites": {"{layers}": {}}}


def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **sweep: Any) -> Plan:
    monkeypatch.chdir(tmp_path)
    write_words(tmp_path / "data")
    config = copy.deepcopy(TINY)
    config["experiments"]["flipped"] = {
        "from": "plain-tiny",
        "transform": {"bitflip": {"weight": {"p": 0}, "input": {"p": 0}}},
    }
    config["sweeps"] = {"s": {"experiment": "flipped", "task": "words", **sweep}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return Plan.load()


def test_named_axes_stand_in_keys_and_values() -> None:
    found = list(points(GRID, SETTINGS, "sweeps.s"))
    assert len(found) == 8
    assert found[5] == (
        [0.1, "weights", "mlp"],
        {"transform.bitflip.weight.p_frac": 0.1, "transform.bitflip.sites": {"*.mlp.*": {}}},
    )
    assert found[-1][0] == [0.1, "activations", "mlp"]


def test_an_axis_that_no_setting_names_is_a_setting() -> None:
    assert list(points({"a.b": [1, 2]}, {}, "s")) == [([1], {"a.b": 1}), ([2], {"a.b": 2})]
    assert list(points({"a.b": [1], "n": ["v"]}, {"c.{n}": "w{n}"}, "s")) == [([1, "v"], {"a.b": 1, "c.v": "wv"})]


@pytest.mark.parametrize(
    ("grid", "settings", "words"),
    [
        ({"p": [1]}, {"a": "{q}"}, ["no such axis", "{q}", "p"]),
        ({"p": []}, {"a": "{p}"}, ["needs values", "grid.p"]),
        ({"p": [1], "q": ["p"]}, {"{q}": "{p}", "p": 2}, ["two settings become one"]),
    ],
)
def test_wrong_axes_are_refused(grid: dict[str, Any], settings: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        list(points(grid, settings, "config.yaml: sweeps.s"))
    for word in ["config.yaml: sweeps.s", *words]:
        assert word in str(error.value)


def test_points_are_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = plan(tmp_path, monkeypatch, grid=GRID, settings=SETTINGS).sweep("s")
    assert node.settings["columns"] == ["p", "operand", "layers"]
    arm = node.inputs["00005"]
    [transform] = arm.settings["transform"]
    assert transform["weight"]["p_frac"] == 0.1
    assert transform["weight"]["zero_out"] == 1.25, "what the sweep does not set stays"
    assert transform["sites"] == [["*.mlp.*", {}]]
    assert arm.settings["fault_seeds"] == [0, 1]
    assert node.inputs["00000"].settings["fault_seeds"] == [0], "without flips nothing is random"


def test_trainings_that_may_diverge_say_whether_they_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are inputs of the sweep and of what Snakemake waits for; other sweeps are as they were."""
    from pipeline_lib.stages import wiring

    monkeypatch.chdir(tmp_path)
    write_words(tmp_path / "data")
    config = copy.deepcopy(TINY)
    tuned = {"finetune": {"steps": 2, "global_batch": 4, "seq_len": 16, "on_divergence": "keep"}}
    config["experiments"]["tuned"] = {"from": "plain-tiny", "recipe": tuned}
    rates = {"experiment": "tuned", "task": "words", "grid": {"recipe.finetune.lr": [1e-3, 1e-2]}}
    config["sweeps"] = {"s": rates, "stops": {**rates, "settings": {"recipe.finetune.on_divergence": "stop"}}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    loaded = Plan.load()
    node, _ = loaded.view("results/sweeps/s.csv")
    assert list(node.inputs) == ["00000", "train-00000", "00001", "train-00001"]
    assert node.inputs["train-00001"].settings["recipe"]["lr"] == 1e-2
    assert node.inputs["train-00001"].path == node.inputs["00001"].inputs["checkpoint"].inputs["train"].path
    waited = wiring.inputs(loaded, "sweep", node.id)
    assert {f"{node.inputs[f'train-0000{i}'].path}/manifest.json" for i in (0, 1)} <= set(waited)
    assert list(loaded.sweep("stops").inputs) == ["00000", "00001"]


def test_unknown_settings_and_tasks_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"sweeps\.s\.settings(.|\n)*no such setting(.|\n)*weight"):
        plan(tmp_path, monkeypatch, grid={"p": [0.1]}, settings={"transform.bitflip.wieght.p": "{p}"})
    right = plan(tmp_path, monkeypatch, grid=GRID, settings=SETTINGS)
    with pytest.raises(UserError, match="nothing of that name"):
        right.view("results/sweeps/s.pdf")


def test_a_sweep_on_request_is_no_part_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = plan(tmp_path, monkeypatch, grid=GRID, settings=SETTINGS, on_request=True)
    assert not any("sweeps" in target for target in asked.targets())
    assert not any("sweep" in role for role in asked.report().inputs)
    assert asked.view("results/sweeps/s.csv")[1] == "table.csv"
    always = plan(tmp_path, monkeypatch, grid=GRID, settings=SETTINGS)
    assert "results/sweeps/s.svg" in always.targets()
    assert "sweep:s" in always.report().inputs


def test_each_kind_of_flip_is_set_from_config_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Probabilities by group and by bit, thresholds, operands, layers: as they reach the stage."""
    monkeypatch.chdir(tmp_path)
    write_words(tmp_path / "data")
    config = copy.deepcopy(TINY)
    flips = {
        "weight": {"p_exp": 0.0, "p_frac": 2.0**-10, "zero_out": 1.25},
        "input": {"p": 1e-4, "bits": {31: 0.0, 30: 1e-6}, "zero_out": 30.0},
        "sites": {"model.layers.0.*": None, "*.down_proj": {"input": {"zero_out": 60.0}}, "*.layers.*": {}},
    }
    config["models"]["of-the-hub"] = {"hub": {"repo": "owner/name"}, "tasks": ["words"]}
    config["experiments"]["flips"] = {"model": "of-the-hub", "transform": {"bitflip": flips}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    loaded = Plan.load()
    arms = loaded.resolver.arms(loaded.resolver.experiments.get("flips"), "words")
    [transform] = arms["transformed"].settings["transform"]
    assert transform["weight"] == {"p": 1e-3, "p_exp": 0.0, "p_frac": 2.0**-10, "zero_out": 1.25}
    assert transform["input"]["bits"] == {"31": 0.0, "30": 1e-6}
    assert transform["sites"][1] == ["*.down_proj", {"input": {"zero_out": 60.0}}]
    assert arms["transformed"].settings["fault_seeds"] == [0, 1]
    assert arms["clean"].settings["transform"] == []
    assert loaded.resolver.experiments.get("flips").recipe_name == "none"


def test_the_ready_sweeps_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the repository's own config.yaml: all on one checkpoint, so that one process evaluates them.

    But for those of learning rates, which train for each point.
    """
    monkeypatch.chdir(ROOT)
    loaded = Plan.load()
    for name, sweep in read_yaml(ROOT / "config.yaml")["sweeps"].items():
        node = loaded.sweep(name)
        if list(sweep["grid"]) == ["recipe.finetune.lr"]:
            assert len({path for path in node.inputs if path.startswith("train-")}) == len(node.settings["rows"])
            continue
        assert len({cell.inputs["checkpoint"].path for cell in node.inputs.values()}) == 1
    texts = loaded.sweep("flip-texts")
    assert {cell.inputs.get("clean", texts.inputs["clean"]).path for cell in texts.inputs.values()} == {
        texts.inputs["clean"].path
    }


def test_continual_pretraining_is_ready_with_its_published_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """22 · N / 100 tokens in blocks of 1,024 of the sample of 10 G tokens, of which no more than they take is fetched."""
    monkeypatch.chdir(ROOT)
    loaded = Plan.load()
    node = loaded.sweep("optical-60m-rates")
    assert (node.settings["rows"][0], node.settings["rows"][-1]) == ([1e-7], [5e-5])
    assert not any("optical-60m-rates" in target for target in loaded.targets())
    train = node.inputs["train-00005"]
    recipe, [transform] = train.settings["recipe"], train.settings["transform"]
    assert {key: recipe[key] for key in ("lr", "seq_len", "global_batch", "max_norm", "on_divergence")} == {
        "lr": 5e-5, "seq_len": 1024, "global_batch": 16, "max_norm": None, "on_divergence": "keep",
    }  # fmt: skip
    assert recipe["steps"] == -(-int(0.22 * 63_226_752) // (16 * 1024))
    assert (transform["type"], transform["levels"]) == ("optical", 256)
    assert train.inputs["init"].label.startswith("pretrain-plain-llama")
    data = train.inputs["tokens"].inputs["dataset"].settings
    assert data["source"]["config"] == "sample-10BT"
    assert data["max_bytes"] == 2**27  # 13.9 M tokens of 5 bytes, up to a power of two
