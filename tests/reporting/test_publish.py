"""The publish target: the card, the choice of files, and an upload to a hub on loopback."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline_lib.artifacts.files import read_json, write_json
from pipeline_lib.artifacts.job import Job
from pipeline_lib.config.errors import UserError
from pipeline_lib.reporting.card import model_card
from pipeline_lib.stages import publish
from tests.conftest import ROOT
from tests.reporting.conftest import BITFLIP, TASK, Store, arm, sealed

SECRET = "a-token-nobody-may-write-down"
PUBLISHED = {"README.md", "config.json", "model.safetensors", "tokenizer.json", "transform.json"}


@pytest.fixture
def job(store: Store, tmp_path: Path) -> Job:
    out = tmp_path / "made"
    for name in (*PUBLISHED - {"README.md"}, "optimizer.pt", "notes.txt", "log/metrics.jsonl"):
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"file": name}))
    inputs = {
        "checkpoint": sealed(tmp_path / "store", "convert", "c", {"dtype": "float32"}, {}, out),
        "result:pydocs": store.inputs["result:bitflip-nano:pydocs"],
    }
    settings = {"repo": "someone/bitflip-nano", "experiment": "bitflip-nano"}
    return Job("publish", "p", "f" * 64, settings, inputs, tmp_path / "work", tmp_path / "out")


def test_the_card_has_metadata_results_and_use() -> None:
    result = {"task": TASK, "clean": arm([400.0], [], []), "transformed": arm([600.0, 620.0], [BITFLIP], [0, 1])}
    result["transformed"]["metrics"]["byte_perplexity"]["mean"] = "inf"
    training = {"model": {"dim": 128}, "transform": [BITFLIP], "recipe": {"type": "pretrain"}, "seed": 0}
    card = model_card("someone/x", "bitflip-nano", {"pydocs": result}, training, {"code": "abc"})
    _, head, body = card.split("---\n", 2)
    data = yaml.safe_load(head)
    assert data["library_name"] == "transformers"
    assert "bitflip" in data["tags"]
    values = [m["value"] for r in data["model-index"][0]["results"] for m in r["metrics"]]
    assert 610.0 in values
    assert len(values) == 3  # infinity is no number on the hub
    assert "| pydocs | word_perplexity | 400.0 | 610 ± 10 | 2 |" in body
    assert "| pydocs | byte_perplexity | 5.991 | ∞ | 2 |" in body
    assert 'name = "someone/x"' in body


def test_only_the_checkpoint_goes_out(job: Job, tmp_path: Path) -> None:
    publish.fill(job, tmp_path / "upload")
    assert {path.name for path in (tmp_path / "upload").iterdir()} == PUBLISHED


def test_downloaded_weights_are_not_published(job: Job, tmp_path: Path) -> None:
    asset = tmp_path / "asset"
    write_json(asset / "files" / "config.json", {})
    job.inputs["checkpoint"] = asset
    with pytest.raises(UserError, match="trained here"):
        publish.fill(job, tmp_path / "upload")


def test_without_a_token_it_says_so(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(UserError, match="HF_TOKEN"):
        publish.run(job)


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's interface as an upload uses."""

    seen: list[tuple[str, str, Any]]
    stored: dict[str, bytes]
    url: str
    status = 200

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        lines = [json.loads(line) for line in raw.decode().splitlines() if line]
        self.seen.append((self.path, self.headers.get("Authorization", ""), lines))
        body = lines[0] if lines else {}
        if self.path == "/api/repos/create":
            return self.answer({"url": f"{self.url}/someone/bitflip-nano"})
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            modes = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
                for f in body["files"]
            ]
            return self.answer({"files": [{**mode, "shouldIgnore": False} for mode in modes]})
        if self.path.endswith("/objects/batch"):
            return self.answer({"transfer": "basic", "objects": [self.wanted(o) for o in body["objects"]]})
        if "/commit/" in self.path:
            return self.answer(
                {
                    "commitUrl": f"{self.url}/someone/bitflip-nano/commit/{'1' * 40}",
                    "commitOid": "1" * 40,
                    "success": True,
                }
            )
        return self.answer({}, 404)

    def wanted(self, entry: dict[str, Any]) -> dict[str, Any]:
        """A large file that the hub has not yet, and where to put it."""
        return {**entry, "actions": {"upload": {"href": f"{self.url}/large/{entry['oid']}", "header": {}}}}

    def do_PUT(self) -> None:
        self.stored[self.path] = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer({})

    def answer(self, value: Any, status: int | None = None) -> None:
        data = json.dumps(value).encode()
        self.send_response(status or self.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[type[Hub]]:
    handler = type("Handler", (Hub,), {"seen": [], "stored": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    handler.url = f"http://127.0.0.1:{server.server_port}"
    yield handler
    server.shutdown()
    server.server_close()
    thread.join()


def run_stage(job: Job, hub: type[Hub], tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """The stage in a process of its own: the hub client reads its settings when it is imported."""
    job.save(tmp_path / "job.json")
    job.out.mkdir()
    code = (
        "import sys; from pathlib import Path\n"
        "from pipeline_lib.artifacts.job import Job; from pipeline_lib.stages import publish\n"
        f"publish.run(Job.load(Path({str(tmp_path / 'job.json')!r})))"
    )
    environment = {
        "PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "HF_TOKEN": SECRET,
        "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1",
    }  # fmt: skip
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)


def test_an_upload_is_one_commit_and_the_token_stays_out_of_files(job: Job, hub: type[Hub], tmp_path: Path) -> None:
    done = run_stage(job, hub, tmp_path)
    assert done.returncode == 0, (done.stderr, [seen[0] for seen in hub.seen])
    [commit] = [lines for path, _, lines in hub.seen if "/commit/" in path]
    sent = {line["value"]["path"] for line in commit if line["key"] in ("file", "lfsFile")}
    assert sent == PUBLISHED
    assert list(hub.stored.values()) == [(job.inputs["checkpoint"] / "model.safetensors").read_bytes()]
    assert all(token == f"Bearer {SECRET}" for _, token, _ in hub.seen)
    written = read_json(job.out / "publish.json")
    assert set(written["result"]["files"]) == PUBLISHED
    assert written["provenance"]["commit"] == "1" * 40
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]
    assert SECRET not in done.stdout + done.stderr


def test_a_refusal_is_one_clear_error(job: Job, hub: type[Hub], tmp_path: Path) -> None:
    hub.status = 403
    done = run_stage(job, hub, tmp_path)
    assert done.returncode != 0
    assert "the hub does not take the upload: status 403" in done.stderr
    assert not (job.out / "publish.json").exists()
