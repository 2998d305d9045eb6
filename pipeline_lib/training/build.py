"""From a training job to its model: weights, transform, faults, memory-saving, compilation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pipeline_lib.artifacts.files import read_json
from pipeline_lib.artifacts.job import Job
from pipeline_lib.artifacts.progress import say
from pipeline_lib.config.errors import UserError
from pipeline_lib.training.clipping import WeightClipping
from pipeline_lib.training.distributed import rank

if TYPE_CHECKING:
    from pipeline_lib.transforms.apply import Applied


def initial_model(job: Job) -> nn.Module:
    """The Hugging Face model a training starts from, fp32 on the CPU: `init`'s weights, or fresh ones from the seed.

    Weights that the recipe clips are in range already.

    Raises:
        UserError: a hub model without its files, or a model that does not fit the data.
    """
    model = _built(job)
    _fits(job, model)
    WeightClipping(model, job.settings["recipe"].get("clip_weights"))()
    return model


def _built(job: Job) -> nn.Module:
    from pipeline_lib.models.checkpoint import checkpoint_directory, load_model
    from pipeline_lib.models.families import family_module

    model, seed = job.settings["model"], job.settings["seed"]
    if "init" in job.inputs:
        return load_model(checkpoint_directory(job.inputs["init"]), "float32")
    if model["family"] == "hub":
        raise UserError(
            "a hub model needs its files", where=f"{job.label}.model", value=model, fix="give the input `init`"
        )
    torch.manual_seed(seed)
    built = family_module(model["family"]).build(model)
    return built if model["family"] == "bert" else _with_llama_weights(built, model["dim"], seed)


def _fits(job: Job, model: Any) -> None:
    """The model must know every token of the data and every position of a sequence."""
    known = model.get_input_embeddings().num_embeddings
    vocab = read_json(job.inputs["tokens"] / "tokens.json")["result"]["vocab_size"] if "tokens" in job.inputs else 0
    if vocab > known:
        raise UserError(
            "the data has more token types than the model's vocabulary",
            where=f"{job.label}: model",
            value=known,
            allowed=f"at least {vocab}",
            fix="train and tokenise with the same tokenizer",
        )
    length, span = job.settings["recipe"]["seq_len"], model.config.max_position_embeddings
    if length > span:
        raise UserError(
            "sequences are longer than the model has positions",
            where=f"{job.label}: recipe.seq_len",
            value=length,
            allowed=f"at most {span}",
            fix="lower seq_len",
        )


def _with_llama_weights(built: nn.Module, dim: int, seed: int) -> nn.Module:
    from pipeline_lib.models.initial import initial_weight

    with torch.no_grad():
        for name, parameter in built.named_parameters():
            parameter.copy_(initial_weight(name, tuple(parameter.shape), dim, seed))
    return built


def apply_transform(job: Job, model: nn.Module) -> Applied:
    """Give the model the job's transform, its faults keyed by the job's seed and global batch."""
    from pipeline_lib.transforms.apply import apply

    recipe = job.settings["recipe"]
    applied = apply(
        model,
        job.settings["transform"],
        seed=job.settings["seed"],
        global_batch=recipe["global_batch"],
        fault_devices=recipe["fault_devices"],
    )
    start_calibrated(job, applied)
    return applied


def start_calibrated(job: Job, applied: Applied) -> None:
    """Work what stage `clip` found into the weights that the training starts with, which must be there.

    Weights that were trained under such a transform bring what it observed.
    """
    from pipeline_lib.transforms.observe import absorb, load_calibrated, load_observed

    if "clip" in job.inputs:
        from safetensors.torch import load_file

        load_calibrated(applied, load_file(job.inputs["clip"] / "clip.safetensors"))
        absorb(applied)
    elif "init" in job.inputs:
        from pipeline_lib.models.checkpoint import checkpoint_directory, load_transform

        load_observed(applied, load_transform(checkpoint_directory(job.inputs["init"]))[1])


def save_memory(model: Any, how: str) -> None:
    """Recompute activations in the backward pass, or keep them (`none`); this never changes results.

    Hugging Face models recompute whole layers, so `selective` is `full` here, and that is said.
    """
    if how == "none":
        return
    if how == "selective" and rank() == 0:
        say("activation_checkpointing: this engine knows no `selective`; it recomputes whole layers (full)")
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # the name before was gradient_checkpointing_enable
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context of a forward pass: bf16 or fp16 matrix products, or plain fp32."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
