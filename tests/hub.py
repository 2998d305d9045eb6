"""A small hub on loopback: the parts of the Hugging Face hub's interface that downloads use, with faults on demand.

    with FakeHub() as hub:
        hub.add("dataset", "owner/name", {"data/train.jsonl": b"..."})
        monkeypatch.setenv("HF_ENDPOINT", hub.url)

A repository has one branch, main; `add` makes a new commit of it, and old commits stay.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from dataclasses import dataclass, field
from email.message import Message
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SUFFIXES = (".parquet", ".safetensors", ".bin", ".gz")
KINDS = {"models": "model", "datasets": "dataset"}


@dataclass
class Fault:
    """What goes wrong for paths that match `pattern`, `times` times (-1: always).

    Attributes:
        status: answer with this status and `headers`.
        drop_after: send this many bytes of the body, then close the connection.
        stall_after: send this many bytes of the body, then nothing until the hub stops.
        truncate: announce and send this many bytes fewer than the file has.
        content: send this instead of the file, under the file's name and announced checksum.
    """

    pattern: str
    times: int = 1
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    drop_after: int | None = None
    stall_after: int | None = None
    truncate: int | None = None
    content: bytes | None = None
    methods: tuple[str, ...] = ("GET",)


@dataclass
class Request:
    """A request that arrived. `range`: the Range header; `token`: whether it carried the hub's token."""

    method: str
    path: str
    range: str | None
    token: bool


class FakeHub:
    """The server; `root` may hold repositories as root/models/<owner>/<name>/… and root/datasets/…"""

    def __init__(self, root: Path | None = None, token: str = "hf_secret") -> None:
        self.token = token
        self.commits: dict[tuple[str, str], dict[str, dict[str, bytes]]] = {}
        self.branches: dict[tuple[str, str], str] = {}
        self.private: set[str] = set()
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.files: dict[str, bytes] = {}  # plain web files, served at /files/<name>
        self._lock, self._stopping = threading.Lock(), threading.Event()
        for folder, kind in KINDS.items():
            for repo in sorted((root / folder).glob("*/*")) if root else []:
                paths = (path for path in repo.rglob("*") if path.is_file())
                name = repo.relative_to(root / folder).as_posix()  # type: ignore[operator]
                self.add(kind, name, {path.relative_to(repo).as_posix(): path.read_bytes() for path in paths})

    def add(self, kind: str, name: str, files: dict[str, bytes], private: bool = False) -> str:
        """Commit `files` as the repository's whole content; returns the commit."""
        listing = [(path, hashlib.sha256(data).hexdigest()) for path, data in sorted(files.items())]
        commit = hashlib.sha1(json.dumps([kind, name, listing]).encode()).hexdigest()
        self.commits.setdefault((kind, name), {})[commit] = dict(files)
        self.branches[kind, name] = commit
        if private:
            self.private.add(name)
        return commit

    def fail(self, pattern: str, **what: object) -> None:
        """Let requests for file or API paths like `pattern` (fnmatch) fail, see Fault."""
        self.faults.append(Fault(pattern, **what))  # type: ignore[arg-type]

    def downloads(self, path: str) -> list[Request]:
        """The GET requests for the content of the file `path`."""
        return [request for request in self.requests if request.method == "GET" and request.path.endswith(path)]

    def env(self) -> dict[str, str]:
        """Environment variables that lead the real client here."""
        return {"HF_ENDPOINT": self.url, "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}

    def __enter__(self) -> Self:
        hub = self

        class Handler(_Handler):
            owner = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def take_fault(self, method: str, path: str) -> Fault | None:
        """The next fault for this request; counted down."""
        with self._lock:
            for fault in self.faults:
                if fault.times and method in fault.methods and fnmatch(path, fault.pattern):
                    fault.times -= 1
                    return fault
        return None

    def wait_until_stopped(self) -> None:
        """Block a request's thread."""
        self._stopping.wait(60)


def file_entry(path: str, data: bytes) -> dict[str, object]:
    """A file as the hub's tree lists it."""
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    entry: dict[str, object] = {"type": "file", "oid": blob, "size": len(data), "path": path}
    if path.endswith(LFS_SUFFIXES):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return entry


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: FakeHub
    headers: Message

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._serve()

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        token = self.headers.get("Authorization") == f"Bearer {self.owner.token}"
        self.owner.requests.append(Request(self.command, path, self.headers.get("Range"), token))
        self._fault = self.owner.take_fault(self.command, path)
        if self._fault and self._fault.status:
            return self._answer(self._fault.status, b"{}", self._fault.headers)
        pieces = path.strip("/").split("/")
        if pieces[0] == "files" and "/".join(pieces[1:]) in self.owner.files:
            data = self.owner.files["/".join(pieces[1:])]
            return self._content(data, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"'})
        if pieces[0] == "api" and len(pieces) >= 4 and pieces[1] in KINDS:
            return self._api(KINDS[pieces[1]], "/".join(pieces[2:4]), pieces[4:], parse_qs(parts.query), token)
        kind = "model"
        if pieces[0] in KINDS:
            kind, pieces = KINDS[pieces[0]], pieces[1:]
        if len(pieces) >= 5 and pieces[2] == "resolve":
            return self._resolve(kind, "/".join(pieces[:2]), pieces[3], "/".join(pieces[4:]), token)
        return self._answer(404, b"{}")

    def _find(self, kind: str, name: str, revision: str, token: bool) -> tuple[str, dict[str, bytes]] | None:
        """(commit, files), or None after an error was answered."""
        commits = self.owner.commits.get((kind, name))
        if commits is None or (name in self.owner.private and not token):
            self._answer(401, b"{}", {"X-Error-Code": "RepoNotFound"})
            return None
        commit = self.owner.branches[kind, name] if revision == "main" else revision
        if commit not in commits:
            self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return None
        return commit, commits[commit]

    def _api(self, kind: str, name: str, rest: list[str], query: dict[str, list[str]], token: bool) -> None:
        revision = rest[1] if len(rest) > 1 else "main"
        found = self._find(kind, name, revision, token)
        if found is None:
            return None
        commit, files = found
        if not rest or rest[0] == "revision":
            siblings = [{"rfilename": path} for path in sorted(files)]
            info = {"id": name, "sha": commit, "siblings": siblings, "private": False, "tags": [], "downloads": 0}
            return self._answer(200, json.dumps(info).encode())
        if rest[0] != "tree":
            return self._answer(404, b"{}")
        folder = "/".join(rest[2:])
        prefix = f"{folder}/" if folder else ""
        below = {path: data for path, data in sorted(files.items()) if path.startswith(prefix)}
        if folder and not below:
            return self._answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        deep = query.get("recursive", ["false"])[0].lower() in ("true", "1")
        entries, folders = [], set()
        for path, data in below.items():
            inner = path[len(prefix) :].split("/")
            folders |= {prefix + "/".join(inner[:n]) for n in range(1, len(inner) if deep else min(2, len(inner)))}
            if deep or len(inner) == 1:
                entries.append(file_entry(path, data))
        entries += [{"type": "directory", "oid": "0" * 40, "size": 0, "path": path} for path in sorted(folders)]
        return self._answer(200, json.dumps(entries).encode())

    def _resolve(self, kind: str, name: str, revision: str, path: str, token: bool) -> None:
        found = self._find(kind, name, revision, token)
        if found is None:
            return None
        commit, files = found
        if path not in files:
            return self._answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        entry = file_entry(path, files[path])
        etag = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]  # type: ignore[index]
        return self._content(files[path], {"ETag": f'"{etag}"', "X-Repo-Commit": commit})

    def _content(self, data: bytes, headers: dict[str, str]) -> None:
        """A file's bytes, from the start of a Range header on, with the fault that is due."""
        fault = self._fault or Fault("")
        data = data if fault.content is None else fault.content
        data = data[: len(data) - fault.truncate] if fault.truncate else data
        asked, status, body = self.headers.get("Range"), 200, data
        if asked:
            start = int(asked.removeprefix("bytes=").split("-")[0])
            if start >= len(data):
                return self._answer(416, b"", {"Content-Range": f"bytes */{len(data)}"})
            status, body = 206, data[start:]
            headers = {**headers, "Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
        end = next((n for n in (fault.drop_after, fault.stall_after) if n is not None), None)
        self._answer(status, body, {**headers, "Accept-Ranges": "bytes"}, send=end)
        if fault.stall_after is not None:
            self.owner.wait_until_stopped()
        return None

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None, send: int | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body if send is None else body[:send])
            self.wfile.flush()
        if send is not None:
            self.close_connection = True


def wait_for(condition: object, seconds: float = 60.0) -> None:
    """Return when `condition()` is true.

    Raises:
        TimeoutError: it did not become true.
    """
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        if time.monotonic() > end:
            raise TimeoutError("the condition did not come true")
        time.sleep(0.01)
