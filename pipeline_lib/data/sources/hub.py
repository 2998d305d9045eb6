"""Documents from a dataset repository on the Hugging Face hub, file after file, as many as are needed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import Field

from pipeline_lib.config.errors import UserError, closest
from pipeline_lib.config.names import REPOSITORY
from pipeline_lib.data.documents import SPLITS, Source, Unit
from pipeline_lib.data.formats import SUFFIXES, TableSettings

if TYPE_CHECKING:
    import pyarrow as pa

    from pipeline_lib.data.hub import HubFile, Repository

Split = Literal["train", "valid", "test"]


class Settings(TableSettings):
    """A repository at a revision; `files`, or the configuration and split that its README lists."""

    type: Literal["hub"] = "hub"
    repo: str = Field(pattern=REPOSITORY, max_length=96, description="dataset repository: owner/name")
    revision: str = Field("main", min_length=1, description="branch, tag or commit; pinned by hub.lock.json")
    config: str | None = Field(None, description="the repository's configuration (subset); default: its default one")
    split: str | dict[Split, str] = Field(
        "train", description="the repository's split that is divided here, or {train, valid, test}: its own splits"
    )
    files: list[str] | dict[Split, list[str]] | None = Field(
        None, description="patterns of files, or {train, valid, test} of them; instead of `config` and `split`"
    )

    def check(self, where: str) -> None:
        """Raises UserError: a file pattern can match no file of a known format."""
        given = self.files.values() if isinstance(self.files, dict) else [self.files or []]
        for pattern in (pattern for patterns in given for pattern in patterns):
            if not pattern.endswith((*SUFFIXES, "*")):
                raise UserError("unknown file format", where=f"{where}.files", value=pattern, allowed=SUFFIXES)

    def open(self, work: Path) -> Source:
        """The repository; its listing is kept in `work`, and the files that are being read."""
        return _Hub(self, work)


class _Hub(Source):
    def __init__(self, settings: Settings, work: Path) -> None:
        from pipeline_lib.data.hub import repository

        self.settings, self.work = settings, work
        self.repository = repository("dataset", settings.repo, settings.revision, work)

    def units(self) -> list[Unit]:
        found = {}
        for split, files in self._selected():
            for file in files:
                name = PurePosixPath(file.path).name
                found.setdefault(file.path, Unit(file.path, split, self.work / "files" / f"{len(found):05d}-{name}"))
        return list(found.values())

    def batches(self, unit: Unit) -> Iterator[pa.Table]:
        assert unit.path is not None
        self.repository.fetch(self.repository.files[unit.name], unit.path)
        return self.settings.read(unit.path, unit.name, f"{self.repository.what}: {unit.name}")

    def release(self, unit: Unit) -> None:
        assert unit.path is not None
        unit.path.unlink(missing_ok=True)

    def origin(self, read: list[Unit]) -> dict[str, Any]:
        files = {unit.name: self.repository.files[unit.name] for unit in read}
        return {
            "repo": self.repository.name,
            "revision": self.repository.commit,
            "files": {path: [file.size, *file.checksum] for path, file in files.items()},
        }

    def _selected(self) -> list[tuple[str | None, list[HubFile]]]:
        settings, patterns = self.settings, self.settings.files
        chosen: dict[str | None, list[str]]
        if patterns is None:
            card = self._card_patterns()
            theirs = settings.split if isinstance(settings.split, dict) else {None: settings.split}
            chosen = {ours: _of_split(self.repository, card, settings.config, name) for ours, name in theirs.items()}
        else:
            chosen = {**patterns} if isinstance(patterns, dict) else {None: patterns}
        return [(split, _readable(self.repository, chosen[split])) for split in (None, *SPLITS) if split in chosen]

    def _card_patterns(self) -> dict[str, list[str]] | None:
        """Split → file patterns of the chosen configuration in the README's header; None: it lists none."""
        readme = self.repository.files.get("README.md")
        text = (
            ""
            if readme is None
            else self.repository.fetch(readme, self.work / "README.md").read_text("utf-8", "replace")
        )
        header = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
        try:
            card = yaml.safe_load(header.group(1)) if header else None
        except yaml.YAMLError:
            card = None
        configs = [c for c in (card or {}).get("configs") or [] if isinstance(c, dict) and c.get("data_files")]
        if not configs:
            return None
        return _data_files(_choose(configs, self.settings.config, self.repository.what)["data_files"])


def _choose(configs: list[dict[str, Any]], wanted: str | None, where: str) -> dict[str, Any]:
    by_name = {str(config.get("config_name", "default")): config for config in configs}
    if wanted is None:
        default = [config for config in configs if config.get("default")] or [by_name.get("default")]
        if default[0] is None and len(configs) == 1:
            default = configs
        if default[0] is not None:
            return default[0]
    elif wanted in by_name:
        return by_name[wanted]
    raise UserError(
        "no such configuration" if wanted else "has several configurations, none of them the default",
        where=where,
        value=wanted,
        allowed=list(by_name),
        fix=closest(wanted or "", by_name) or "set `config:` of the source",
    )


def _data_files(data_files: Any) -> dict[str, list[str]]:
    """The three ways of writing `data_files` in a README, as split → patterns."""
    if isinstance(data_files, str):
        data_files = [data_files]
    if isinstance(data_files, dict):
        data_files = [{"split": split, "path": path} for split, path in data_files.items()]
    found: dict[str, list[str]] = {}
    for entry in data_files:
        split, path = (entry.get("split", "train"), entry["path"]) if isinstance(entry, dict) else ("train", entry)
        found.setdefault(str(split), []).extend([path] if isinstance(path, str) else path)
    return found


def _of_split(repository: Repository, card: dict[str, list[str]] | None, config: str | None, split: str) -> list[str]:
    """Patterns of a split: what the README says, else the files (in the configuration's folder) that bear its name."""
    if card is not None:
        if split in card:
            return card[split]
        raise UserError(
            "no such split",
            where=repository.what,
            value=split,
            allowed=list(card),
            fix=closest(split, card) or "set `split:`",
        )
    named = re.compile(rf"(^|[-_./]){re.escape(split)}([-_./]|$)")
    folder = f"{config}/" if config else ""
    found = [p for p in repository.files if p.startswith(folder) and p.endswith(SUFFIXES) and named.search(p)]
    if not found:
        raise UserError(
            "the repository does not say which files hold this split",
            where=repository.what,
            value=split,
            allowed=[path for path in repository.files if path.endswith(SUFFIXES)][:20],
            fix="set `files:` of the source",
        )
    return found


def _readable(repository: Repository, patterns: list[str]) -> list[HubFile]:
    files = [file for file in repository.select(patterns) if file.path.endswith(SUFFIXES)]
    if not files:
        raise UserError(
            "no file of a known format matches",
            where=repository.what,
            value=patterns,
            allowed=[path for path in repository.files if path.endswith(SUFFIXES)][:20] or "none in this repository",
            fix="set `files:` of the source",
        )
    return files
