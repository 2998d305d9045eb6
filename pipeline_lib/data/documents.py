"""What a dataset source is: settings that planning can check, and units of documents that a stage can read.

Imports nothing heavy: planning reads the settings classes of all sources.
"""

from __future__ import annotations

import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pipeline_lib.config.base import Settings

if TYPE_CHECKING:
    import pyarrow as pa

SPLITS = ("train", "valid", "test", "holdout")
"""`holdout` is for a model whose losses choose what others are trained on; most datasets have none."""


@dataclass(frozen=True)
class Unit:
    """A part of a source that is read (and after a kill, read again) as a whole: mostly a file.

    Attributes:
        name: unique in the source.
        split: the split that the source itself gives its documents; None: they are divided by hash.
        path: the local file that holds it, once it is there.
    """

    name: str
    split: str | None = None
    path: Path | None = None


class Source(ABC):
    """An opened source. Units and documents come in the same order every time."""

    @abstractmethod
    def units(self) -> list[Unit]:
        """All units in order. May ask the network for a listing; fetches no documents."""

    @abstractmethod
    def batches(self, unit: Unit) -> Iterator[pa.Table]:
        """The documents of a unit: columns `id` and `text` (strings) and any of the source's own.

        A column `group` names what may not be divided between splits (default: the document itself);
        it is dropped from the artifact.
        """

    def release(self, unit: Unit) -> None:  # noqa: B027 - most sources have nothing to delete
        """The unit has been read for the last time; a download may be deleted."""

    def origin(self, read: list[Unit]) -> dict[str, Any]:
        """What the documents were made from, for dataset.json; plain JSON, the same on every machine."""
        return {"units": len(read)}


class SourceSettings(Settings):
    """Settings of a source: a plug-in module in data/sources/ has one subclass, named `Settings`."""

    def check(self, where: str) -> None:
        """Look at what can be looked at without the network, at planning time.

        Raises:
            UserError: a file is missing, or this machine cannot provide the source.
        """

    def resolved(self) -> Self:
        """The settings with everything filled in that identity must know, such as a version or a file's SHA-256."""
        return self

    def open(self, work: Path) -> Source:
        """The source; it may keep downloads below `work`, which survives kills."""
        raise NotImplementedError(type(self).__module__)


def place(source: Path, target: Path) -> None:
    """Put a finished file at `target` and leave it at `source` too: a hard link where possible, else a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
