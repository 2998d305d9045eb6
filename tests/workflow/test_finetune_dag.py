"""Fine-tuning through Snakemake: of a hub model with adapters and of a local one in full, under flips."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.evaluation.conftest import checkpoint  # noqa: F401  (a fixture)
from tests.hub import FakeHub
from tests.workflow.clone import TINY, Clone

pytestmark = pytest.mark.slow

REPO = "tests/tiny-llama"
SMALL = {"global_batch": 4, "seq_len": 16, "lr": 0.01}
CONFIG: dict[str, Any] = {
    **TINY,
    "models": {
        "hubllama": {"hub": {"repo": REPO, "parameters": 20_000}, "dataset": "words", "run": {"gpus": 0, "threads": 1}},
        "mine": {"local": {"path": "checkpoints/mine"}, "dataset": "words", "run": {"gpus": 0, "threads": 1}},
    },
    "experiments": {
        "adapted-hub": {
            "model": "hubllama",
            "transform": "bitflip",
            "recipe": {"finetune": {"method": "lora", "lora": {"r": 4, "alpha": 4}, **SMALL}},
        },
        "tuned-mine": {
            "model": "mine",
            "transform": "bitflip",
            "recipe": {"finetune": {"steps": 3, "clip_weights": 0.25, **SMALL}},
        },
        "plain-mine": {},
        "rates-mine": {
            "model": "mine",
            "recipe": {"finetune": {"method": "lora", "steps": 3, "max_norm": None, "on_divergence": "keep", **SMALL}},
            "tasks": [],
        },
    },
    "fault_seeds": 1,
    "sweeps": {"rates": {"experiment": "rates-mine", "task": "words", "grid": {"recipe.finetune.lr": [0.01, 1.0e30]}}},
}
TARGETS = [f"results/{name}/words.json" for name in ("adapted-hub", "tuned-mine", "plain-mine")]


@pytest.fixture(scope="module")
def hub(checkpoint: Path) -> Iterator[FakeHub]:
    with FakeHub() as started, pytest.MonkeyPatch.context() as patch:
        started.add("model", REPO, {path.name: path.read_bytes() for path in checkpoint.iterdir()})
        for name, value in started.env().items():
            patch.setenv(name, value)
        yield started


@pytest.fixture(scope="module")
def finished(hub: FakeHub, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Clone:
    clone = Clone.make(tmp_path_factory.mktemp("finetune-dag") / "clone", CONFIG)
    mine = clone.root / "checkpoints" / "mine"
    shutil.copytree(checkpoint, mine)
    (mine / "pytorch_model.bin").write_bytes(b"a pickle")
    clone.snakemake(*TARGETS, "results/sweeps/rates.csv", "results/sweeps/rates.svg")
    return clone


def artifact(clone: Clone, stage: str, label: str) -> Path:
    [found] = (clone.root / "results" / "store" / stage).glob(f"{label}*")
    return found


def test_each_is_trained_and_evaluated_under_flips(finished: Clone) -> None:
    for target in TARGETS:
        result = json.loads((finished.root / target).read_text())["result"]
        assert ("transformed" in result) == ("plain" not in target)
        assert result["clean"]["metrics"]["byte_perplexity"]["mean"] > 1


def test_a_training_that_diverges_is_a_marked_row_of_its_sweep(finished: Clone) -> None:
    good, gone = csv.DictReader((finished.root / "results/sweeps/rates.csv").open())
    assert (good["diverged"], gone["diverged"]) == ("false", "true")
    assert 1 < float(good["byte_perplexity"]) < 1e3
    assert "diverged" in (finished.root / "results/sweeps/rates.svg").read_text()


def test_the_budget_of_adapters_is_one_percent_of_the_parameters(finished: Clone) -> None:
    made = json.loads((artifact(finished, "train", "finetune-bitflip-tests-tiny-llama") / "train.json").read_text())
    assert made["result"]["steps"] == 4  # 200 tokens, 64 a step
    assert made["result"]["trained_parameters"] == 2 * 4 * (16 + 16 + 16 + 8 + 16 + 8 + 16 + 16 + 3 * (16 + 32))


def test_the_hub_checkpoint_and_its_adapters(finished: Clone, checkpoint: Path) -> None:
    made = artifact(finished, "convert", "finetune-bitflip-tests-tiny-llama")
    base, merged = load_file(checkpoint / "model.safetensors"), load_file(made / "model.safetensors")
    adapters = load_file(made / "adapter" / "adapter_model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    update = adapters[f"base_model.model.{name}.lora_B.weight"] @ adapters[f"base_model.model.{name}.lora_A.weight"]
    assert update.abs().max() > 1e-3
    assert (merged[f"{name}.weight"] - base[f"{name}.weight"] - update).abs().max() < 1e-5
    config = json.loads((made / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == REPO


def test_a_local_checkpoint_is_copied_clipped_and_left_alone(finished: Clone, checkpoint: Path) -> None:
    [copied] = [
        p for p in (finished.root / "results/store/assets").glob("local-*") if (p / "files/config.json").exists()
    ]
    assert not (copied / "files" / "pytorch_model.bin").exists()
    assert (copied / "files" / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()
    made = load_file(artifact(finished, "convert", "finetune-bitflip-local") / "model.safetensors")
    base = load_file(checkpoint / "model.safetensors")
    for key, value in made.items():
        if "_proj" in key:
            assert value.abs().max() <= 0.25 < base[key].abs().max(), key


def test_what_a_local_model_is_known_by(finished: Clone) -> None:
    """Its content: a new place or a touch runs nothing, another weight runs what depends on it."""
    folder = finished.root / "checkpoints"
    assert finished.would_run(*TARGETS) == {}
    folder.joinpath("mine").rename(folder / "moved")
    edited = json.loads(json.dumps(CONFIG))
    edited["models"]["mine"]["local"]["path"] = "checkpoints/moved"
    finished.write_config(edited)
    (folder / "moved" / "model.safetensors").touch()
    assert finished.would_run(*TARGETS) == {}
    weights = load_file(folder / "moved" / "model.safetensors")
    save_file({key: value + 0.01 for key, value in weights.items()}, folder / "moved" / "model.safetensors")
    jobs = finished.would_run("results/tuned-mine/words.json", "results/plain-mine/words.json")
    # The tokenizer's files are the same: text is not tokenised again.
    assert jobs == {"assets": 1, "train": 1, "convert": 1, "evaluate": 3, "result": 2, "experiment_result": 2}
    shutil.rmtree(folder / "moved")
    output = finished.run("plan", "results/tuned-mine/words.json", ok=False)
    assert "models.mine.local.path: no such folder" in output
    assert "checkpoints/moved" in output
