"""Models in folders of this machine: what planning says of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline_lib.config.errors import UserError
from pipeline_lib.config.plan import Plan
from tests.workflow.clone import TINY, write_words

FILES = ("config.json", "model.safetensors", "tokenizer.json")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that looks like a checkpoint, in a project."""
    monkeypatch.chdir(tmp_path)
    write_words(tmp_path / "data")
    (tmp_path / "mine").mkdir()
    for name in FILES:
        (tmp_path / "mine" / name).write_text(name)
    return tmp_path / "mine"


def plan(experiment: dict[str, Any], **local: Any) -> Plan:
    mine = {"local": {"path": "mine", **local}, "dataset": "words"}
    config = {**TINY, "models": {"mine": mine}, "experiments": {"x": {"model": "mine", **experiment}}, "sweeps": {}}
    Path("config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return Plan.load()


def test_it_is_evaluated_as_it_is_by_default(folder: Path) -> None:
    made = plan({"transform": "bitflip"})
    node = made.resolver.checkpoint(made.resolver.experiments.get("x"))
    assert (node.stage, sorted(node.settings["files"])) == ("assets", sorted(FILES))
    assert node.execution["path"] == str(folder)
    assert "mine" not in str(node.settings), "where it lies is no part of what it is"


def test_fine_tuning_reads_its_budget_from_the_parameters(folder: Path) -> None:
    made = plan({"recipe": {"finetune": {"method": "lora", "global_batch": 16, "seq_len": 2048}}}, parameters=8 * 10**9)
    train = made.resolver.train(made.resolver.experiments.get("x"))
    assert train.settings["recipe"]["steps"] == 2442
    assert train.settings["model"] == {"family": "local", "content": made.resolver.architecture(
        made.resolver.experiments.get("x"), 1)["content"], "architecture": "llama"}  # fmt: skip


@pytest.mark.parametrize(
    ("experiment", "message"),
    [
        (
            {"recipe": {"finetune": {"method": "lora"}}},
            "needs the model's number of parameters: give it as `parameters`",
        ),
        ({"recipe": "pretrain"}, "builds its model from dimensions, and mine is a checkpoint"),
    ],
)
def test_impossible_recipes_are_refused(folder: Path, experiment: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan(experiment)


@pytest.mark.parametrize("missing", FILES)
def test_a_missing_file_is_named(folder: Path, missing: str) -> None:
    (folder / missing).unlink()
    with pytest.raises(UserError, match=r"models.mine.local.path: no (config.json|\*.safetensors|tokenizer.json)"):
        plan({})


def test_no_folder_and_an_adapter_are_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="loaded on top of the model unasked"):
        plan({})
    with pytest.raises(UserError, match="no such folder"):
        plan({}, path="yours")


def test_the_content_is_the_identity(folder: Path) -> None:
    def mark() -> str:
        made = plan({})
        return made.resolver.checkpoint(made.resolver.experiments.get("x")).fingerprint

    before = mark()
    (folder / "pytorch_model.bin").write_text("no part of it")
    assert mark() == before
    (folder / "model.safetensors").write_text("another")
    assert mark() != before
