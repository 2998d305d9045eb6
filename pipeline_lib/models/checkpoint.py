"""Hugging Face checkpoints on disk: found, loaded, written. Local files only, safetensors only, no code from a hub."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline_lib.artifacts.files import read_json, write_json
from pipeline_lib.config.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"float32": "float32", "float16": "float16", "bfloat16": "bfloat16", "fp32": "float32", "bf16": "bfloat16"}
TRANSFORM_FILE = "transform.json"
TRANSFORM_STATE = "transform.safetensors"
MAX_SHARD = "5GB"


def checkpoint_directory(artifact: Path) -> Path:
    """The directory of the Hugging Face checkpoint in an artifact of `convert` or of `assets`.

    Raises:
        UserError: there is no checkpoint in it, or one without safetensors.
    """
    found = next((path for path in (artifact, artifact / "files") if (path / "config.json").is_file()), None)
    if found is None:
        raise UserError("no config.json of a model", where=str(artifact), fix="use the artifact of convert or assets")
    if not any(found.glob("*.safetensors")):
        raise UserError(
            "the checkpoint has no safetensors",
            where=str(found),
            value=sorted(path.name for path in found.iterdir() if path.is_file()),
            allowed="weights in *.safetensors; pickled weights are never loaded",
            fix="choose a revision of the model that holds safetensors",
        )
    return found


def load_model(directory: Path, dtype: str = "float32", auto_class: str | None = None) -> PreTrainedModel:
    """A model from a local checkpoint, in evaluation mode, on the CPU.

    Args:
        directory: what `checkpoint_directory` gave.
        dtype: of the weights: float32, float16 or bfloat16.
        auto_class: name of the transformers Auto class; by default the one that fits what the checkpoint
            says it holds (a masked or causal language model, a classifier).

    Raises:
        UserError: unknown dtype, or weights that do not fit the configuration.
    """
    import torch
    import transformers

    if dtype not in DTYPES:
        raise UserError("unknown dtype", value=dtype, allowed=DTYPES)
    transformers.utils.logging.disable_progress_bar()
    _register_own(directory)
    name = auto_class or auto_class_of(read_json(directory / "config.json"))
    model, report = getattr(transformers, name).from_pretrained(
        directory,
        dtype=getattr(torch, DTYPES[dtype]),
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # refused below, by name
    )
    wrong = {key[0] if isinstance(key, tuple) else key for key in report["mismatched_keys"]}
    if auto_class is None:  # a head that the checkpoint was never trained with is made new, but only when asked for
        wrong |= set(report["missing_keys"])
    if wrong:
        raise UserError(
            "weights are missing or of another shape than the configuration says",
            where=str(directory),
            value=sorted(wrong)[:5],
            fix="remove the artifact, so that it is made again",
        )
    return model.eval()


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a local directory."""
    from transformers import AutoTokenizer

    _register_own(directory)
    return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)


def _register_own(directory: Path) -> None:
    """Make transformers know a model class of ours, if the checkpoint is of one."""
    path = directory / "config.json"
    if path.is_file() and read_json(path).get("model_type") == "crammed_bert":
        importlib.import_module("pipeline_lib.models.crammed_bert")


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer: those that the model's generation settings name, else the tokenizer's `eos`."""
    named: Any = model.generation_config.eos_token_id if model.generation_config is not None else None
    named = tokenizer.eos_token_id if named is None else named
    return [] if named is None else [int(token) for token in (named if isinstance(named, list) else [named])]


def save_checkpoint(
    directory: Path,
    config: PretrainedConfig,
    state: Mapping[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
    architecture: str,
) -> None:
    """Write a complete Hugging Face checkpoint: configurations, weights, tokenizer.

    Args:
        directory: exists.
        config: of the model; it gets the tokenizer's special token ids, the dtype and the architecture.
        state: canonical name → tensor, all of one floating dtype.
        tokenizer: written beside the weights.
        architecture: class name of the model, e.g. LlamaForCausalLM.
    """
    from transformers import GenerationConfig

    dtypes = {str(value.dtype).removeprefix("torch.") for value in state.values() if value.is_floating_point()}
    (dtype,) = dtypes
    config.architectures = [architecture]
    config.dtype = dtype
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(tokenizer, name))
    config.save_pretrained(directory)
    if "CausalLM" in architecture:
        GenerationConfig.from_model_config(config).save_pretrained(directory)
    save_state(directory, state)
    tokenizer.save_pretrained(directory)


def save_state(directory: Path, state: Mapping[str, torch.Tensor]) -> None:
    """Write tensors as model.safetensors; above 5 GB as shards with model.safetensors.index.json."""
    from huggingface_hub import save_torch_state_dict

    tensors = {name: state[name].contiguous() for name in sorted(state)}
    save_torch_state_dict(tensors, directory, max_shard_size=MAX_SHARD, metadata={"format": "pt"})


def load_state(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of model.safetensors or its shards, as they are on disk."""
    from safetensors.torch import load_file

    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        return load_file(directory / "model.safetensors")
    shards = sorted(set(read_json(index)["weight_map"].values()))
    return {name: tensor for shard in shards for name, tensor in load_file(directory / shard).items()}


def save_transform(directory: Path, transform: list[dict[str, Any]], state: Mapping[str, torch.Tensor]) -> None:
    """Write which transforms the weights were trained under, and what these added (nothing for most)."""
    from safetensors.torch import save_file

    write_json(directory / TRANSFORM_FILE, {"result": {"transform": transform, "tensors": sorted(state)}})
    if state:
        save_file({name: state[name].contiguous() for name in sorted(state)}, directory / TRANSFORM_STATE)


def load_transform(directory: Path) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """(settings of the transforms, canonical name → tensor added by them); both empty for a hub checkpoint."""
    from safetensors.torch import load_file

    if not (directory / TRANSFORM_FILE).is_file():
        return [], {}
    result = read_json(directory / TRANSFORM_FILE)["result"]
    return result["transform"], load_file(directory / TRANSFORM_STATE) if result["tensors"] else {}


def auto_class_of(config: Mapping[str, Any]) -> str:
    """The transformers Auto class for what a configuration says the checkpoint holds."""
    architecture = (config.get("architectures") or [""])[0]
    for head in ("ForMaskedLM", "ForSequenceClassification"):
        if architecture.endswith(head):
            return f"AutoModel{head}"
    return "AutoModelForCausalLM"
