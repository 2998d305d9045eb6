"""Downloads that go on where they broke off and end in a verified file or one clear error."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from pipeline_lib.artifacts.progress import Progress, say
from pipeline_lib.config.errors import UserError
from pipeline_lib.data.retry import Answer, Patience

CHUNK = 1 << 20
TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Remote:
    """A file to download.

    Attributes:
        url: https, or http on this machine.
        what: its name in messages; never holds a secret.
        size: bytes, where known beforehand.
        checksum: ("sha256", hex) or ("git", hex of the git blob id), where known beforehand.
        headers: of the request; a token stands only here.
        page: what a person can open to see it.
    """

    url: str
    what: str
    size: int | None = None
    checksum: tuple[str, str] | None = None
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    page: str = ""


def check_url(url: str, where: str) -> str:
    """`url`, if it is https, or http to this machine.

    Raises:
        UserError: it is not: what is not encrypted can be changed or read on its way.
    """
    try:
        parts = urlsplit(url)
        host = parts.hostname
    except ValueError:
        parts, host = None, None
    local = host in ("localhost", "127.0.0.1", "::1")
    if parts is None or not host or not (parts.scheme == "https" or (parts.scheme == "http" and local)):
        raise UserError(
            "not an address to download from",
            where=where,
            value=url,
            allowed="https://… (http:// only for localhost)",
            fix="use https",
        )
    return url


def fetch(remote: Remote, target: Path) -> Path:
    """Download `remote` to `target`, beginning with what an earlier call left in `<target>.part`.

    Returns:
        `target`, whose size and checksum are those of `remote`.

    Raises:
        UserError: refused, not there, still failing after TRIES tries, no room, or not the content
            that was announced.
    """
    check_url(remote.url, remote.what)
    if target.exists() and _matches(target, remote):
        return target
    target.unlink(missing_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    with Progress(remote.what, remote.size, "B", done=_size(part)) as progress:
        patience, doubts = Patience(remote.what, remote.page), 0
        while True:
            try:
                patience.call(lambda: _continue(remote, part, progress, patience))
                if _matches(part, remote):
                    break
                found = f"{_size(part)} bytes, {' '.join(_checksum(part, remote.checksum))}"
            except _OtherSizeError as error:
                found = f"{error.args[0]} bytes"
            part.unlink(missing_ok=True)
            doubts += 1  # a broken line can spoil a byte; twice the same is the server's content
            if doubts == 2:
                raise _changed(remote, found)
            say(f"{remote.what}: not the content that was announced; downloaded again")
    with open(part, "rb") as file:
        os.fsync(file.fileno())
    os.replace(part, target)
    return target


class _OtherSizeError(Exception):
    """The server announces another size (bytes) than it listed."""


def _changed(remote: Remote, found: str) -> UserError:
    expected = f"{remote.size if remote.size is not None else '?'} bytes, {' '.join(remote.checksum or ())}"
    return UserError(
        "the content is not what was announced; nothing was kept of it",
        where=remote.what,
        value=found,
        allowed=expected,
        fix="try again later; if it stays so, the file has changed: set its new SHA-256, or another revision",
    )


def _continue(remote: Remote, part: Path, progress: Progress, patience: Patience) -> None:
    """One request for what is missing in `part`; returns when all of it has arrived."""
    from huggingface_hub import get_session

    have = _size(part)
    if remote.size is not None:
        if have == remote.size and part.exists():
            return
        if have > remote.size:
            part.unlink()
            have = 0
    headers = {**remote.headers, "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    with get_session().stream("GET", remote.url, headers=headers, timeout=TIMEOUT_S) as response:
        if response.status_code == 416:  # what we have is not a beginning of what is there
            part.unlink(missing_ok=True)
            raise ConnectionError("the part that was downloaded does not fit the file")
        if response.status_code not in (200, 206):
            raise Answer(response.status_code, response.headers)
        if response.status_code == 206 and _range_start(response.headers) != have:
            raise ConnectionError("the server sent another range than the one asked for")
        if response.status_code == 200:
            have = 0
        total = _announced(response.headers, have)
        if remote.size is not None and total not in (None, remote.size):
            raise _OtherSizeError(total)
        progress.update(have - progress.done)
        with open(part, "ab" if have else "wb") as file:
            for chunk in response.iter_raw():
                file.write(chunk)
                file.flush()  # what has arrived survives a kill, whatever the file system's block size
                have += len(chunk)
                progress.update(len(chunk))
                patience.progressed(len(chunk))
    if (total is not None and have < total) or (remote.size is not None and have < remote.size):
        raise ConnectionError(f"the connection ended after {have} bytes")


def _range_start(headers: Mapping[str, str]) -> int | None:
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range", ""))
    return int(match.group(1)) if match else None


def _announced(headers: Mapping[str, str], have: int) -> int | None:
    length = headers.get("Content-Length")
    return have + int(length) if length is not None and length.isdigit() else None


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _matches(path: Path, remote: Remote) -> bool:
    if remote.size is not None and path.stat().st_size != remote.size:
        return False
    return remote.checksum is None or _checksum(path, remote.checksum) == remote.checksum


def _checksum(path: Path, like: tuple[str, str] | None) -> tuple[str, str]:
    """(kind, hex) of the file at `path`; a git blob id is SHA-1 over 'blob <size>\\0' and the content."""
    kind = like[0] if like else "sha256"
    digest = hashlib.sha256() if kind == "sha256" else hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return kind, digest.hexdigest()
