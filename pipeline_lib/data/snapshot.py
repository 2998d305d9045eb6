"""Files from the hub, the web or a folder as they are: models, tokenizers, data sets of tasks."""

from __future__ import annotations

import shutil
from pathlib import Path, PurePosixPath

from pipeline_lib.artifacts.files import sha256_file, write_json
from pipeline_lib.artifacts.job import Job
from pipeline_lib.artifacts.progress import Progress, say
from pipeline_lib.config.errors import UserError
from pipeline_lib.data.documents import place
from pipeline_lib.data.download import Remote, check_url, fetch
from pipeline_lib.data.hub import HubFile, Repository, glob_pattern, repository, safe_path

# Formats that run code when they are read, or weights in a format that nothing here reads.
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz")
OTHER_WEIGHTS = (".h5", ".msgpack", ".onnx", ".gguf", ".tflite", ".ot")


def build(job: Job) -> None:
    """Make the assets artifact: files/<path> and asset.json.

    Raises:
        UserError: the files cannot be had, or a model has no safetensors.
    """
    result = {"url": _from_url, "hub": _from_hub, "local": _from_folder}[job.settings["kind"]](job)
    write_json(job.out / "asset.json", {"result": result, "provenance": {}})


def _from_url(job: Job) -> dict[str, object]:
    url, digest, name = job.settings["url"], job.settings["sha256"], safe_path(job.settings["name"], "asset name")
    path = fetch(Remote(check_url(url, "asset url"), url, checksum=("sha256", digest)), job.work / "files" / name)
    place(path, job.out / "files" / name)
    return {"url": url, "revision": None, "files": {name: [path.stat().st_size, digest]}}


def _from_folder(job: Job) -> dict[str, object]:
    """Copies, since the user may go on working in the folder; each is checked against the content that was planned."""
    folder, planned = Path(job.execution["path"]), job.settings["files"]
    files: dict[str, list[object]] = {}
    with Progress(f"copy {folder.name}", len(planned), "files") as progress:
        for name, digest in sorted(planned.items()):
            copy = job.work / "files" / safe_path(name, str(folder))
            if not copy.exists() or sha256_file(copy) != digest:
                copy.parent.mkdir(parents=True, exist_ok=True)
                _copy(folder / name, copy, digest)
            files[name] = [copy.stat().st_size, digest]
            place(copy, job.out / "files" / name)
            progress.update()
    return {"files": files}


def _copy(source: Path, target: Path, digest: str) -> None:
    found = "missing"
    if source.is_file():
        shutil.copyfile(source, target)
        found = sha256_file(target)
    if found != digest:
        raise UserError(
            "changed since it was planned",
            where=str(source),
            value=found,
            allowed=digest,
            fix="give the command again: it plans with the new content",
        )


def _from_hub(job: Job) -> dict[str, object]:
    settings = job.settings
    repo = repository(settings["repo_type"], settings["repo"], settings["revision"], job.work)
    chosen = select(repo, settings["patterns"])
    files: dict[str, list[object]] = {}
    with Progress(repo.what, sum(file.size for file in chosen), "B") as progress:
        for file in chosen:
            path = repo.fetch(file, job.work / "files" / file.path)
            kind, digest = file.checksum
            files[file.path] = [file.size, digest if kind == "sha256" else sha256_file(path)]
            place(path, job.out / "files" / file.path)
            progress.update(file.size)
    return {"repo": repo.name, "repo_type": repo.kind, "revision": repo.commit, "files": files}


def select(repo: Repository, patterns: list[str] | None) -> list[HubFile]:
    """The files of `repo` that match `patterns` (None: all that are safe to read).

    Raises:
        UserError: none matches, one is asked for by a name that is a pickle's, or a model's weights are
            asked for and are there as pickles only.
    """
    for pattern in patterns or []:
        if pattern.endswith(PICKLES):
            raise UserError(
                "pickles are not loaded: they can run code", where=repo.what, value=pattern, fix="ask for *.safetensors"
            )
    matching = repo.select(patterns if patterns is not None else ["**"])
    chosen = [file for file in matching if not file.path.endswith(PICKLES + OTHER_WEIGHTS)]
    weights_wanted = repo.kind == "model" and any(".safetensors" in pattern for pattern in patterns or [".safetensors"])
    pickled = [path for path in repo.files if path.endswith(PICKLES[:4])]
    if weights_wanted and pickled and not any(file.path.endswith(".safetensors") for file in chosen):
        raise UserError(
            "its weights are there as pickles only, which can run code when they are read",
            where=repo.what,
            value=pickled[:5],
            allowed="*.safetensors",
            fix="choose a revision or a copy of it with safetensors, or convert it once in a place you trust",
        )
    if not chosen:
        raise UserError(
            "no file matches",
            where=repo.what,
            value=patterns,
            allowed=list(repo.files)[:30],
            fix="correct the patterns",
        )
    for pattern in patterns or []:
        if not any(glob_pattern(pattern).fullmatch(path) for path in repo.files):
            say(f"{repo.what}: no file matches {pattern}")
    return sorted(chosen, key=lambda file: PurePosixPath(file.path))
