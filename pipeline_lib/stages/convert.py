"""convert: trained weights become a complete Hugging Face checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pipeline_lib.artifacts.job import Job
from pipeline_lib.config.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

CHECK = "check.safetensors"
TOLERANCE = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 5e-2}
"""Largest difference of logits between the engine's model and the checkpoint, as a share of the largest logit
where that is above 1."""


def run(job: Job) -> None:
    """Write a checkpoint of config.json, generation_config.json, model.safetensors, the tokenizer's files,
    transform.json and, where the transform has state, transform.safetensors; then load it as a user would.

    Raises:
        UserError: the weights do not fit the model, or the checkpoint computes something else than the
            model that was trained.
    """
    import torch

    from pipeline_lib.models import checkpoint

    settings, train = job.settings, job.inputs["train"]
    if settings["layout"] != "hf":
        raise UserError("unknown layout of the weights", where=job.label, value=settings["layout"], allowed=["hf"])
    dtype = checkpoint.DTYPES[settings["dtype"]]
    state = {
        name: value.to(getattr(torch, dtype)) if value.is_floating_point() else value
        for name, value in checkpoint.load_state(train).items()
    }
    config, architecture = _configuration(job)
    tokenizer = checkpoint.load_tokenizer(job.inputs["tokenizer"])
    checkpoint.save_checkpoint(job.out, config, state, tokenizer, architecture)
    checkpoint.save_transform(job.out, settings["transform"], checkpoint.load_transform(train)[1])
    model = checkpoint.load_model(job.out, dtype)
    surplus = sorted(set(state) - set(model.state_dict()))
    if surplus:
        raise UserError(
            f"the trained weights hold tensors that {architecture} has no place for",
            where=job.label,
            value=surplus[:5],
            fix="remove the train artifact, so that it is made again",
        )
    if (train / CHECK).is_file():
        _compare_logits(job, model, train / CHECK, TOLERANCE[dtype])


def _configuration(job: Job) -> tuple[PretrainedConfig, str]:
    """The model's configuration, and the name of its class in transformers."""
    from transformers import AutoConfig

    from pipeline_lib.models.families import family_module

    model = job.settings["model"]
    if model["family"] != "hub":
        family = family_module(model["family"])
        return family.config(model), family.ARCHITECTURE
    # The engine that trained a hub model leaves its configuration beside the weights.
    config = AutoConfig.from_pretrained(job.inputs["train"], local_files_only=True, trust_remote_code=False)
    (architecture,) = config.architectures or []
    return config, architecture


def _compare_logits(job: Job, model: PreTrainedModel, path: Path, tolerance: float) -> None:
    """The checkpoint must say of fixed tokens what the trained model said."""
    import torch
    from safetensors.torch import load_file

    check = load_file(path)
    with torch.no_grad():
        logits_BTV = model(check["tokens"]).logits.float()
    difference = (logits_BTV - check["logits"]).abs().max().item()
    bound = tolerance * max(check["logits"].abs().max().item(), 1.0)
    if not difference <= bound:
        raise UserError(
            "the checkpoint computes other logits than the model that was trained",
            where=job.label,
            value=difference,
            allowed=f"at most {bound:.3g}",
            fix="this is a fault of Errata or of the installed transformers: pin the versions of the pin list",
        )
