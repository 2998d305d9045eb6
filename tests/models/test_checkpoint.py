"""Checkpoints on disk: local files, safetensors, complete."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline_lib.config.errors import UserError
from pipeline_lib.models import checkpoint, llama

SHAPE = {"dim": 32, "layers": 2, "heads": 4, "kv_heads": 2, "ffn": 48}
MODEL = {"family": "llama", **SHAPE, "vocab": 64, "max_seq_len": 16}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("asset") / "files"
    torch.manual_seed(0)
    llama.build(MODEL).save_pretrained(directory)
    return directory


def test_directory_of_either_kind_of_artifact(saved: Path) -> None:
    assert checkpoint.checkpoint_directory(saved) == saved
    assert checkpoint.checkpoint_directory(saved.parent) == saved


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json"):
        checkpoint.checkpoint_directory(tmp_path)


def test_pickled_weights_are_refused(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((saved / "config.json").read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="no safetensors"):
        checkpoint.checkpoint_directory(tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_load(saved: Path, dtype: str) -> None:
    model = checkpoint.load_model(saved, dtype)
    assert {str(parameter.dtype) for parameter in model.parameters()} == {f"torch.{dtype}"}
    assert not model.training
    assert type(model).__name__ == "LlamaForCausalLM"


def test_unknown_dtype(saved: Path) -> None:
    with pytest.raises(UserError, match="unknown dtype"):
        checkpoint.load_model(saved, "int4")


def test_missing_weights_are_an_error(saved: Path, tmp_path: Path) -> None:
    state = checkpoint.load_state(saved)
    del state["model.layers.1.mlp.up_proj.weight"]
    (tmp_path / "config.json").write_bytes((saved / "config.json").read_bytes())
    checkpoint.save_state(tmp_path, state)
    with pytest.raises(UserError, match=r"up_proj"):
        checkpoint.load_model(tmp_path)


def test_a_new_head_is_made_when_asked_for(saved: Path) -> None:
    model = checkpoint.load_model(saved, auto_class="AutoModelForSequenceClassification")
    assert type(model).__name__ == "LlamaForSequenceClassification"


def test_large_states_are_sharded(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "MAX_SHARD", "20KB")
    state = checkpoint.load_state(saved)
    checkpoint.save_state(tmp_path, state)
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    again = checkpoint.load_state(tmp_path)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) for name in state)


def test_transform_state(tmp_path: Path) -> None:
    assert checkpoint.load_transform(tmp_path) == ([], {})
    checkpoint.save_transform(tmp_path, [{"type": "toy"}], {"lm_head.transform.scale": torch.ones(2)})
    settings, state = checkpoint.load_transform(tmp_path)
    assert settings == [{"type": "toy"}]
    assert torch.equal(state["lm_head.transform.scale"], torch.ones(2))
    checkpoint.save_transform(tmp_path / "none", [], {})
    assert checkpoint.load_transform(tmp_path / "none") == ([], {})
    assert not (tmp_path / "none" / checkpoint.TRANSFORM_STATE).exists()
