"""One file from the web, known by its SHA-256."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import unquote, urlsplit

from pydantic import Field

from pipeline_lib.config.errors import UserError
from pipeline_lib.data.documents import Source, Unit
from pipeline_lib.data.download import Remote, check_url, fetch
from pipeline_lib.data.formats import SUFFIXES, TableSettings

if TYPE_CHECKING:
    import pyarrow as pa


class Settings(TableSettings):
    """The file's format follows from its name."""

    type: Literal["url"] = "url"
    url: str = Field(description="https://… of a jsonl, json, parquet or txt file")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="SHA-256 of the file: 64 hexadecimal digits")

    def check(self, where: str) -> None:
        """Raises UserError: not https, or an unknown format."""
        check_url(self.url, f"{where}.url")
        if not file_name(self.url).endswith(SUFFIXES):
            raise UserError("unknown file format", where=f"{where}.url", value=self.url, allowed=SUFFIXES)

    def open(self, work: Path) -> Source:
        """The file, downloaded when its documents are read."""
        return _Url(self, work)


def file_name(url: str) -> str:
    """The last part of a URL's path."""
    return PurePosixPath(unquote(urlsplit(url).path)).name


class _Url(Source):
    def __init__(self, settings: Settings, work: Path) -> None:
        self.settings, self.target = settings, work / "download"

    def units(self) -> list[Unit]:
        return [Unit(file_name(self.settings.url), path=self.target)]

    def batches(self, unit: Unit) -> Iterator[pa.Table]:
        url = self.settings.url
        fetch(Remote(url, url, checksum=("sha256", self.settings.sha256)), self.target)
        return self.settings.read(self.target, unit.name, url)

    def release(self, unit: Unit) -> None:
        self.target.unlink(missing_ok=True)

    def origin(self, read: list[Unit]) -> dict[str, Any]:
        return {"url": self.settings.url, "sha256": self.settings.sha256}
