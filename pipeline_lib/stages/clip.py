"""The stage `clip`: state of a transform that is chosen from what the layers of the exact model see."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline_lib.artifacts.files import sync, write_json
from pipeline_lib.artifacts.job import Job
from pipeline_lib.artifacts.progress import Progress, say
from pipeline_lib.config.registry import TRANSFORMS
from pipeline_lib.config.validate import validate

if TYPE_CHECKING:
    import torch

    from pipeline_lib.transforms.apply import Applied

STATE, REPORT = "clip.safetensors", "clip.json"


def run(job: Job) -> None:
    """Leave clip.safetensors (state by its name in the transformed model) and clip.json (each layer's figures).

    Inputs: init (a checkpoint), tokenizer, and text: a dataset, or a teacher's records. A search by layers is resumed
    layer by layer; what is observed in passes is observed anew.

    Raises:
        UserError: no text, or nothing to calibrate.
    """
    import torch
    from safetensors.torch import load_file, save_file

    from pipeline_lib.models.checkpoint import checkpoint_directory, load_model
    from pipeline_lib.transforms.apply import apply
    from pipeline_lib.transforms.observe import calibrate, observers

    if job.execution.get("threads"):
        torch.set_num_threads(int(job.execution["threads"]))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model: Any = load_model(checkpoint_directory(job.inputs["init"]), "float32")
    applied = apply(model, job.settings["transform"], seed=0)
    kept = job.work / "inputs.safetensors"

    def inputs() -> dict[str, torch.Tensor]:
        if not kept.exists():
            _observe(job, model, applied, kept, device)
        return load_file(kept)

    if observers(applied):
        state, figures = _watched(job, model.to(device), applied)
    else:
        state, figures = calibrate(applied, inputs, job.work / "layers", device)
    save_file(state, job.out / STATE)
    write_json(job.out / REPORT, {"result": {"layers": figures, "total": _total(figures)}})


def _text(job: Job, model: Any) -> tuple[Any, list[torch.Tensor]]:
    """How the transform is calibrated, and the sequences it is calibrated on."""
    from pipeline_lib.data.calibration import sequences
    from pipeline_lib.models.checkpoint import load_tokenizer

    given = job.settings["transform"][0]
    module = TRANSFORMS.load(given["type"])
    how = module.calibration(validate(module.Settings, given, f"transform {given['type']}"))
    length = min(how.sequence, model.config.max_position_embeddings)
    tokens = sequences(
        job.inputs["text"], load_tokenizer(job.inputs["tokenizer"]),
        columns=how.columns,
        samples=how.samples, max_tokens=how.max_tokens, long=how.long, length=length, seed=how.seed,
    )  # fmt: skip
    return how, tokens


def _watched(job: Job, model: Any, applied: Applied) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, float]]]:
    """Run the exact model over batches of the text; functions that observe choose their state."""
    import torch

    from pipeline_lib.transforms.observe import watch

    how, tokens = _text(job, model)
    firsts = range(0, len(tokens), how.batch_size)[: how.batches]
    batches = [torch.stack(tokens[first : first + how.batch_size]) for first in firsts]
    say(f"observing {sum(batch.numel() for batch in batches)} tokens in {len(batches)} batches")
    with Progress("observe", len(batches), "batches") as progress:

        def shown() -> Any:
            for batch in batches:
                yield batch
                progress.update()

        state = watch(applied, model, shown())
    return state, {name: {"largest": value.abs().max().item()} for name, value in state.items()}


def _observe(job: Job, model: Any, applied: Applied, path: Path, device: torch.device) -> None:
    """Run the exact model over the text and keep a sample of its layers' inputs, at once and durably."""
    from safetensors.torch import save_file

    from pipeline_lib.transforms.observe import calibrated_functions, sampled_inputs

    functions = calibrated_functions(applied)
    how, tokens = _text(job, model)
    total = sum(len(sequence) for sequence in tokens)
    say(f"calibrating {len(functions)} layers on {total} tokens in {len(tokens)} sequences")
    layers = {name: layer for name, (layer, _) in functions.items()}
    with Progress("observe", len(tokens), "sequences") as progress:

        def batches() -> Any:
            for sequence in tokens:
                yield sequence[None]
                progress.update()

        applied.remove()  # what is observed is the exact model
        seen = sampled_inputs(model.to(device), layers, batches(), max(total // how.tokens, 1))
    model.cpu()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.clone() for name, tensor in seen.items()}, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)
    sync(path.parent)


def _total(figures: dict[str, dict[str, float]]) -> dict[str, float]:
    """The mean of every figure over the layers."""
    names = next(iter(figures.values()))
    return {name: sum(layer[name] for layer in figures.values()) / len(figures) for name in names}
