"""Checkpoints in folders of this machine: which files they are, and by which content they are known."""

from __future__ import annotations

import os
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from pipeline_lib.config.errors import UserError
from pipeline_lib.config.hashes import file_hashes


def checkpoint_files(path: str, patterns: Sequence[str], where: str) -> dict[str, str]:
    """{name: SHA-256} of the files of a Hugging Face checkpoint that match `patterns`, sorted by name.

    Raises:
        UserError: no such folder, or no checkpoint with safetensors in it.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(
            "no such folder",
            where=where,
            value=path,
            allowed="the folder of a Hugging Face checkpoint",
            fix=f"correct the path; it is looked up from {os.getcwd()}",
        )
    names = sorted(file.name for file in folder.iterdir() if file.is_file())
    for needed in ("config.json", "*.safetensors", "tokenizer.json"):
        if not any(fnmatchcase(name, needed) for name in names):
            raise UserError(
                f"no {needed} in the folder",
                where=where,
                value=path,
                allowed="a checkpoint with config.json, weights in *.safetensors (pickles are never loaded) and "
                "tokenizer.json",
                fix=f"save it with `save_pretrained`; there are {', '.join(names[:12]) or 'no files'}",
            )
    if "adapter_config.json" in names:
        raise UserError(
            "the folder holds an adapter, which would be loaded on top of the model unasked",
            where=where,
            value=path,
            fix="merge it (peft's merge_and_unload), or move adapter_config.json away",
        )
    chosen = [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
    return file_hashes({name: folder / name for name in chosen})
