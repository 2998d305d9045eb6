"""Repositories on the Hugging Face hub: what a revision holds, and its files, verified."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from pipeline_lib.artifacts.files import read_json, write_json
from pipeline_lib.config.errors import UserError
from pipeline_lib.data.download import Remote, check_url, fetch
from pipeline_lib.data.retry import Patience

if TYPE_CHECKING:
    from huggingface_hub import HfApi

PUBLIC = "https://huggingface.co"


def endpoint() -> str:
    """The hub's address: HF_ENDPOINT, or the public one."""
    return check_url(os.environ.get("HF_ENDPOINT") or PUBLIC, "environment variable HF_ENDPOINT").rstrip("/")


def client() -> HfApi:
    """The hub's client; a token comes from the environment variable HF_TOKEN and from nowhere else."""
    # Only read when the library is first imported: no telemetry, and no request for the list of it.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import HfApi

    return HfApi(endpoint=endpoint(), token=os.environ.get("HF_TOKEN") or False)


@dataclass(frozen=True)
class HubFile:
    """A file of a repository: path, bytes, and ("sha256" | "git", hex) of its content."""

    path: str
    size: int
    checksum: tuple[str, str]


@dataclass(frozen=True)
class Repository:
    """A hub repository at one commit.

    Attributes:
        kind: "model" or "dataset".
        name: owner/name.
        commit: 40 hexadecimal digits.
        files: by path, sorted.
    """

    kind: str
    name: str
    commit: str
    files: dict[str, HubFile]

    @property
    def what(self) -> str:
        """Its name in messages."""
        return f"{self.kind}s/{self.name}@{self.commit[:12]}"

    def select(self, patterns: Iterable[str]) -> list[HubFile]:
        """The files that match one of the glob patterns (`*` stays within a folder, `**` does not), sorted."""
        compiled = [glob_pattern(pattern) for pattern in patterns]
        return [file for path, file in self.files.items() if any(regex.fullmatch(path) for regex in compiled)]

    def fetch(self, file: HubFile, target: Path) -> Path:
        """`file` at `target`: downloaded, resumed or found there, and verified.

        Raises:
            UserError: see `download.fetch`.
        """
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers

        url = hf_hub_url(self.name, file.path, repo_type=self.kind, revision=self.commit, endpoint=endpoint())
        headers = build_hf_headers(token=os.environ.get("HF_TOKEN") or False)
        what = f"{self.what}: {file.path}"
        return fetch(Remote(url, what, file.size, file.checksum, headers, page(self.kind, self.name)), target)


def page(kind: str, name: str) -> str:
    """The repository's page for people."""
    return f"{endpoint()}/{'datasets/' if kind == 'dataset' else ''}{name}"


def commit_of(kind: str, name: str, revision: str) -> str:
    """The commit that a branch, tag or commit of a repository stands for now, asked from the hub.

    Raises:
        UserError: no such repository or revision, no access, or the hub cannot be reached.
    """
    api, what = client(), f"{kind}s/{name}@{revision}"
    info = Patience(what, page(kind, name)).call(lambda: api.repo_info(name, repo_type=kind, revision=revision))
    if not re.fullmatch(r"[0-9a-f]{40}", info.sha or ""):
        raise UserError("the hub named no commit", where=what, value=info.sha, fix="check HF_ENDPOINT")
    return str(info.sha)


def repository(kind: str, name: str, revision: str, work: Path) -> Repository:
    """A repository at `revision`, with its list of files.

    The answer is kept at `work/listing.json`: a stage that was killed goes on with the same commit and
    the same checksums, even when the branch has moved or the content at the hub has changed.

    Raises:
        UserError: see `commit_of`, or a file's name would leave the folder it belongs in.
    """
    kept = work / "listing.json"
    asked = [endpoint(), kind, name, revision]
    listing = read_json(kept) if kept.exists() else None
    if listing is None or listing["asked"] != asked:
        commit = commit_of(kind, name, revision)
        listing = {"asked": asked, "commit": commit, "files": _list(kind, name, commit)}
        write_json(kept, listing)
    files = {path: HubFile(path, size, (how, digest)) for path, (size, how, digest) in sorted(listing["files"].items())}
    return Repository(kind, name, listing["commit"], files)


def _list(kind: str, name: str, commit: str) -> dict[str, list[Any]]:
    from huggingface_hub.hf_api import RepoFile

    api, what = client(), f"{kind}s/{name}@{commit[:12]}"
    entries = Patience(what, page(kind, name)).call(
        lambda: list(api.list_repo_tree(name, repo_type=kind, revision=commit, recursive=True))
    )
    files: dict[str, list[Any]] = {}
    for entry in entries:
        if isinstance(entry, RepoFile):
            checksum = ["sha256", entry.lfs.sha256] if entry.lfs else ["git", entry.blob_id]
            files[safe_path(entry.path, what)] = [entry.size, *checksum]
    return files


def safe_path(path: str, where: str) -> str:
    """`path`, if it stays inside the folder it is put in.

    Raises:
        UserError: it does not.
    """
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\\" in path or "\0" in path:
        raise UserError(
            "a file's name leads out of its folder", where=where, value=path, fix="do not use this repository"
        )
    return path


def glob_pattern(pattern: str) -> re.Pattern[str]:
    """A glob as a regular expression for whole paths: `**` crosses folders, `*` and `?` do not."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", pattern)
    meaning = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return re.compile("".join(meaning.get(part) or re.escape(part) for part in parts))
