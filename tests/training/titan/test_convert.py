"""From torchtitan's weights to a Hugging Face checkpoint: complete, and the same function."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline_lib.artifacts.files import read_json
from pipeline_lib.artifacts.job import Job
from pipeline_lib.config.errors import UserError
from pipeline_lib.models.checkpoint import load_model, load_tokenizer
from pipeline_lib.stages import convert


def convert_job(train: Job, out: Path, **settings: str) -> Job:
    out.mkdir(parents=True)
    own = {"model": train.settings["model"], "transform": train.settings["transform"]}
    own |= {"layout": "hf", "dtype": "float32", **settings}
    inputs = {"train": train.out, "tokenizer": train.inputs["tokenizer"]}
    return Job("convert", "c", "b" * 64, own, inputs, out.with_name("work"), out, {})


@pytest.fixture(scope="module")
def converted(faulty: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    job = convert_job(faulty, tmp_path_factory.mktemp("convert") / "out")
    convert.run(job)
    return job.out


def test_the_checkpoint_is_complete(converted: Path, faulty: Job) -> None:
    names = {path.name for path in converted.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "transform.json"} <= names
    assert "transform.safetensors" not in names
    config, tokenizer = read_json(converted / "config.json"), load_tokenizer(converted)
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}
    assert (config["bos_token_id"], config["eos_token_id"]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert config["max_position_embeddings"] == faulty.settings["recipe"]["seq_len"]
    assert read_json(converted / "transform.json")["result"]["transform"] == faulty.settings["transform"]


def test_logits_equal_those_of_our_titan_model(converted: Path, faulty: Job) -> None:
    check = load_file(faulty.out / "check.safetensors")
    with torch.no_grad():
        logits = load_model(converted)(check["tokens"]).logits
    assert check["logits"].std() > 0.1
    assert (logits - check["logits"]).abs().max() <= 1e-5


def test_logits_equal_those_of_stock_torchtitan(converted: Path, faulty: Job) -> None:
    """torchtitan's own model and its own conversion, with neighbouring pairs rotated, agree too."""
    from torchtitan.models.llama3.model.args import RoPEScalingArgs
    from torchtitan.models.llama3.model.model import Transformer
    from torchtitan.models.llama3.model.state_dict_adapter import Llama3StateDictAdapter

    from pipeline_lib.training.titan.model import TitanLlama, model_args

    args = model_args(faulty.settings["model"], seed=0)
    assert args.rope_scaling_args == RoPEScalingArgs(scaling_factor=1.0)
    stock = Transformer(args)
    assert not isinstance(stock, TitanLlama)
    stock.load_state_dict(Llama3StateDictAdapter(args, None).from_hf(load_file(converted / "model.safetensors")))
    tokens_BT = torch.randint(64, (4, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert (load_model(converted)(tokens_BT).logits - stock(tokens_BT)).abs().max() <= 1e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes(faulty: Job, tmp_path: Path, dtype: str) -> None:
    job = convert_job(faulty, tmp_path / "out", dtype=dtype)
    convert.run(job)
    assert read_json(job.out / "config.json")["dtype"] == dtype
    assert {str(t.dtype) for t in load_file(job.out / "model.safetensors").values()} == {f"torch.{dtype}"}


def damaged(faulty: Job, root: Path, change) -> Job:
    shutil.copytree(faulty.out, root / "train")
    path = root / "train" / "model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path)
    return dataclasses.replace(faulty, out=root / "train")


def swap_halves(state: dict[str, torch.Tensor]) -> None:
    """As if query rows were in torchtitan's order: the error that a forgotten permutation makes."""
    name = "model.layers.0.self_attn.q_proj.weight"
    rows = torch.arange(8).reshape(4, 2).T.flatten()
    state[name] = state[name].view(4, 8, -1)[:, rows].reshape(state[name].shape).contiguous()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swap_halves, "other logits"),
        (lambda state: state.pop("model.norm.weight"), r"model\.norm\.weight"),
        (lambda state: state.update(surplus=torch.zeros(1)), "surplus"),
        (lambda state: state.update({"lm_head.weight": torch.zeros(65, 32)}), r"lm_head\.weight"),
    ],
)
def test_weights_that_do_not_fit_are_refused(faulty: Job, tmp_path: Path, change, message: str) -> None:
    with pytest.raises(UserError, match=message):
        convert.run(convert_job(damaged(faulty, tmp_path, change), tmp_path / "out"))


def test_unknown_layout(faulty: Job, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="layout"):
        convert.run(convert_job(faulty, tmp_path / "out", layout="titan"))
