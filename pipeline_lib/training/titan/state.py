"""The state of a training in a checkpoint directory: torch's distributed checkpoint and two small files beside it."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torchtitan.components.checkpoint import ModelWrapper
from torchtitan.train import Trainer

from pipeline_lib.artifacts.files import read_json, write_json
from pipeline_lib.config.errors import UserError
from pipeline_lib.training import distributed
from pipeline_lib.training.checkpoints import seal

POSITION = "position.json"
RANDOM = "random.safetensors"
_LONE = ".*assuming the intent is to (save|load) in a single process.*"


def save(trainer: Trainer, directory: Path, position: dict[str, Any]) -> None:
    """Write a sealed checkpoint; every rank calls it.

    Holds weights (those of transforms included), optimizer and schedule, which torch can shard anew for
    another number of ranks, the generators' states, and `position` (JSON values).
    """
    if distributed.rank() == 0 and directory.exists():
        shutil.rmtree(directory)
    distributed.barrier()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", _LONE)
        dcp_save(_parts(trainer), checkpoint_id=directory)
    if distributed.rank() == 0:
        generators = {"cpu": torch.get_rng_state()}
        if trainer.device.type == "cuda":
            generators["cuda"] = torch.cuda.get_rng_state(trainer.device)
        save_file(generators, directory / RANDOM)
        write_json(directory / POSITION, position)
        seal(directory)
    distributed.barrier()


def load(trainer: Trainer, directory: Path, fingerprint: str) -> dict[str, Any]:
    """Put a checkpoint's state into the trainer; every rank calls it. Returns its position.

    Raises:
        UserError: the checkpoint belongs to another training.
    """
    position = read_json(directory / POSITION)
    if position["fingerprint"] != fingerprint:
        raise UserError(
            "the checkpoint in the work directory belongs to another training",
            where=str(directory),
            value=position["fingerprint"],
            allowed=fingerprint,
            fix="remove the work directory; the training then begins anew",
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", _LONE)
        dcp_load(_parts(trainer), checkpoint_id=directory)
    generators = load_file(directory / RANDOM)
    torch.set_rng_state(generators["cpu"])
    if trainer.device.type == "cuda" and "cuda" in generators:
        torch.cuda.set_rng_state(generators["cuda"], trainer.device)
    return position


def _parts(trainer: Trainer) -> dict[str, Any]:
    return {
        "model": ModelWrapper(trainer.model_parts),
        "optimizer": trainer.optimizers,
        "lr_scheduler": trainer.lr_schedulers,
    }
