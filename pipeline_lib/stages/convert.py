"""convert: trained weights become a complete Hugging Face checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline_lib.artifacts.files import write_bytes, write_json
from pipeline_lib.artifacts.job import Job
from pipeline_lib.config.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

CHECK = "check.safetensors"
ADAPTER = "adapter"
GENERATION = "generation_config.json"
TOLERANCE = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 5e-2}
"""Largest difference of logits between the engine's model and the checkpoint, as a share of the largest logit
where that is above 1."""


def run(job: Job) -> None:
    """Write a checkpoint of config.json, generation_config.json, model.safetensors, the tokenizer's files,
    transform.json and, where the transform has state, transform.safetensors, and an adapter's own files below
    adapter/ (it is merged into model.safetensors); then load it as a user would.
    Where the transform packs weights, the folder `packed` holds the model in that form: see `transforms.packed`.

    Weights come from a training (input `train`), or as they are from a checkpoint (`init`) with the state that stage
    `clip` chose for them.

    Raises:
        UserError: the weights do not fit the model, or the checkpoint computes something else than the
            model that was trained, or its packed form than the transformed model.
    """
    if job.settings["layout"] != "hf":
        raise UserError("unknown layout of the weights", where=job.label, value=job.settings["layout"], allowed=["hf"])
    model = _trained(job) if "train" in job.inputs else _calibrated(job)
    _write_packed(job, model)


def _calibrated(job: Job) -> PreTrainedModel:
    """Write untrained weights with their calibration."""
    from safetensors.torch import load_file

    from pipeline_lib.models import checkpoint

    model = checkpoint.load_model(checkpoint.checkpoint_directory(job.inputs["init"]), job.settings["dtype"])
    model.save_pretrained(job.out, max_shard_size=checkpoint.MAX_SHARD)
    checkpoint.load_tokenizer(job.inputs["tokenizer"]).save_pretrained(job.out)
    state = load_file(job.inputs["clip"] / "clip.safetensors")
    checkpoint.save_transform(job.out, job.settings["transform"], _whole_state(model, job.settings["transform"], state))
    return checkpoint.load_model(job.out, job.settings["dtype"])


def _whole_state(
    model: PreTrainedModel, transform: list[dict[str, Any]], calibrated: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """All that a transform adds to a model, its calibrated part as given."""
    from pipeline_lib.transforms.apply import apply
    from pipeline_lib.transforms.observe import load_calibrated
    from pipeline_lib.transforms.state import transform_state

    applied = apply(model, transform, seed=0)
    load_calibrated(applied, calibrated)
    state = {name: tensor.clone() for name, tensor in transform_state(model).items()}
    applied.remove()
    return state


def _write_packed(job: Job, model: PreTrainedModel) -> None:
    """The packed form, if the transform has one; loaded again, it must say what the transformed model says."""
    import torch

    from pipeline_lib.models.checkpoint import DTYPES, load_transform
    from pipeline_lib.transforms.apply import apply
    from pipeline_lib.transforms.packed import (
        FOLDER,
        PACKED_DTYPE,
        load_packed,
        pack,
        packed_sites,
        packing,
        save_packed,
    )
    from pipeline_lib.transforms.state import load_transform_state, transform_state

    transform = packing(job.settings["transform"])
    if not transform:
        return
    applied = apply(model, transform, seed=0)
    added = load_transform(job.out)[1]
    if transform_state(model):
        load_transform_state(model, {name: added[name] for name in transform_state(model)})
    length = min(32, model.config.max_position_embeddings)
    tokens_BT = torch.arange(2 * length).view(2, length) * 97 % model.config.vocab_size
    applied.context.begin(0, 0)
    packed = {id(module.weight) for module, _ in packed_sites(applied).values()}
    with torch.no_grad():
        exact_BTV = model(tokens_BT).logits.float()
        for parameter in model.parameters():  # what is not packed is kept in 16 bits
            if id(parameter) not in packed:
                parameter.copy_(parameter.to(PACKED_DTYPE))
        expected_BTV = model(tokens_BT).logits.float()
    pack(applied)
    sizes = save_packed(job.out / FOLDER, model, applied, PACKED_DTYPE)
    change = (expected_BTV - exact_BTV).abs().max().item()
    write_json(job.out / FOLDER / "sizes.json", {"result": {**sizes, "largest_change_of_a_logit_by_16_bits": change}})
    dtype = DTYPES[job.settings["dtype"]]
    loaded, again = load_packed(job.out / FOLDER, dtype)
    with torch.no_grad():
        again.context.begin(0, 0)
        difference = (loaded(tokens_BT).logits.float() - expected_BTV).abs().max().item()
    _within(job, "the packed checkpoint", "the transformed model", difference, expected_BTV, TOLERANCE[dtype])


def _trained(job: Job) -> PreTrainedModel:
    """Write trained weights."""
    import torch

    from pipeline_lib.models import checkpoint

    settings, train = job.settings, job.inputs["train"]
    dtype = checkpoint.DTYPES[settings["dtype"]]
    state = {
        name: value.to(getattr(torch, dtype)) if value.is_floating_point() else value
        for name, value in checkpoint.load_state(train).items()
    }
    config, architecture = _configuration(job)
    tokenizer = checkpoint.load_tokenizer(job.inputs["tokenizer"])
    checkpoint.save_checkpoint(job.out, config, state, tokenizer, architecture)
    if (train / ADAPTER).is_dir():
        shutil.copytree(train / ADAPTER, job.out / ADAPTER)
    if (train / GENERATION).is_file():  # a hub model's own ends of an answer
        write_bytes(job.out / GENERATION, (train / GENERATION).read_bytes())
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
    return model


def _configuration(job: Job) -> tuple[PretrainedConfig, str]:
    """The model's configuration, and the name of its class in transformers."""
    from transformers import AutoConfig

    from pipeline_lib.models.families import family_module

    model = job.settings["model"]
    if model["family"] not in ("hub", "local"):
        family = family_module(model["family"])
        named = getattr(family, "architecture", None)
        return family.config(model), named(model) if named else family.ARCHITECTURE
    # The engine that trained a hub or local checkpoint leaves its configuration beside the weights.
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
    _within(job, "the checkpoint", "the model that was trained", difference, check["logits"], tolerance)


def _within(job: Job, what: str, whose: str, difference: float, logits: torch.Tensor, tolerance: float) -> None:
    """Logits of `what` must be those of `whose`."""
    bound = tolerance * max(logits.abs().max().item(), 1.0)
    if not difference <= bound:
        raise UserError(
            f"{what} computes other logits than {whose}",
            where=job.label,
            value=difference,
            allowed=f"at most {bound:.3g}",
            fix="this is a fault of Errata or of the installed transformers: pin the versions of the pin list",
        )
