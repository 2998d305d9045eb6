"""publish: an experiment's checkpoint and model card, to the Hugging Face hub. Runs only when asked for by name."""

from __future__ import annotations

import os
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from pipeline_lib.artifacts.files import read_json, sha256_file, write_bytes, write_json
from pipeline_lib.artifacts.job import Job
from pipeline_lib.artifacts.progress import say
from pipeline_lib.artifacts.provenance import commit
from pipeline_lib.artifacts.store import SEAL, read_seal
from pipeline_lib.config.errors import UserError
from pipeline_lib.reporting.card import model_card

FILES = (
    "config.json", "generation_config.json", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json",
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "transform.json", "transform.safetensors",
)  # fmt: skip


def run(job: Job) -> None:
    """Upload what `fill` gathers to `settings.repo`; leave publish.json with its files and commit.

    Given again after a failure, only what the hub has not yet is sent.

    Raises:
        UserError: no token, no access, or weights that were not made here.
    """
    folder = job.work / "upload"
    shutil.rmtree(folder, ignore_errors=True)
    fill(job, folder)
    files = {path.name: [path.stat().st_size, sha256_file(path)] for path in sorted(folder.iterdir())}
    sent = upload(job.settings["repo"], folder, f"{job.settings['experiment']}, fingerprint {job.fingerprint[:12]}")
    result = {"repo": job.settings["repo"], "experiment": job.settings["experiment"], "files": files}
    write_json(job.out / "publish.json", {"result": result, "provenance": sent})


def fill(job: Job, folder: Path) -> None:
    """Put the checkpoint's files (as links) and README.md into `folder`; nothing else of the artifact goes out.

    Raises:
        UserError: the checkpoint was downloaded, not trained.
    """
    checkpoint = job.inputs["checkpoint"]
    if not (checkpoint / "config.json").exists():
        raise UserError(
            "only weights that were trained here are published",
            where=f"{job.settings['experiment']}.publish",
            value=str(checkpoint),
            fix="remove `publish`, or publish an experiment that has a training recipe",
        )
    folder.mkdir(parents=True)
    for path in sorted(checkpoint.iterdir()):
        if path.is_file() and any(fnmatch(path.name, pattern) for pattern in FILES):
            (folder / path.name).symlink_to(path.resolve())
    results = {
        role.partition(":")[2]: read_json(path / "result.json")["result"]
        for role, path in job.inputs.items()
        if role.startswith("result:")
    }
    seal = read_seal(checkpoint)["spec"] if (checkpoint / SEAL).exists() else {}
    origin = {"checkpoint fingerprint": seal.get("fingerprint", "unknown"), "code": commit()}
    card = model_card(job.settings["repo"], job.settings["experiment"], results, _training(checkpoint, seal), origin)
    write_bytes(folder / "README.md", card.encode())


def _training(checkpoint: Path, seal: dict[str, Any]) -> dict[str, Any]:
    """Settings of the training behind a checkpoint, as far as its artifact is still in the store."""
    behind = seal.get("inputs", {}).get("train")
    path = checkpoint.parent.parent / behind["stage"] / behind["id"] if behind else None
    if path is not None and (path / SEAL).exists():
        return read_seal(path)["spec"]["settings"]
    return seal.get("settings", {})


def upload(repo: str, folder: Path, message: str) -> dict[str, Any]:
    """One commit with the files of `folder`; returns {url, commit}. The token comes from HF_TOKEN alone.

    Raises:
        UserError: no token, or the hub refuses.
    """
    from pipeline_lib.data.hub import client

    if not os.environ.get("HF_TOKEN"):
        raise UserError(
            "publishing needs a token with write access",
            where="environment variable HF_TOKEN",
            fix="export HF_TOKEN=…, from the settings page of your hub account; it is never written anywhere",
        )
    api = client()
    from huggingface_hub.errors import HfHubHTTPError

    try:
        api.create_repo(repo, exist_ok=True)
        info = api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message)
    except (HfHubHTTPError, OSError, RuntimeError) as error:  # a file's failed upload comes as a RuntimeError
        cause = error.__cause__ or error
        response = getattr(cause, "response", None)
        why = f"status {response.status_code}" if response is not None else str(cause)
        raise UserError(
            f"the hub does not take the upload: {why}",
            where=repo,
            fix="check that HF_TOKEN may write to this repository, then give the same command again",
        ) from None
    say(f"published to {info.repo_url}")
    return {"url": str(info.repo_url), "commit": info.oid}
