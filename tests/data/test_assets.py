"""The assets stage: files as they are, safetensors only."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from pipeline_lib.config.errors import UserError
from tests.data.jobs import digests, result, run
from tests.hub import FakeHub

MODEL = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": bytes(range(256)) * 2000,
    "pytorch_model.bin": b"\x80\x04a pickle",
    "model.onnx": b"onnx",
    "tokenizer.json": b"{}",
    "original/params.json": b"{}",
    "README.md": b"# model",
}
PATTERNS = ["*.json", "*.safetensors", "*.model", "tokenizer*"]


def settings(**other: Any) -> dict[str, Any]:
    given = {"kind": "hub", "repo": "o/m", "repo_type": "model", "revision": "main", "patterns": PATTERNS}
    return {**given, **other}


def test_a_model(hub: FakeHub, tmp_path: Path) -> None:
    commit = hub.add("model", "o/m", MODEL)
    out = run("assets", tmp_path, settings())
    expected = {name: MODEL[name] for name in ("config.json", "model.safetensors", "tokenizer.json")}
    found = {p.relative_to(out / "files").as_posix(): p.read_bytes() for p in (out / "files").rglob("*")}
    assert found == expected
    made = result(out / "asset.json")
    assert made["revision"] == commit
    assert made["files"] == {name: [len(d), hashlib.sha256(d).hexdigest()] for name, d in expected.items()}


def test_everything_but_pickles(hub: FakeHub, tmp_path: Path) -> None:
    hub.add("model", "o/m", MODEL)
    out = run("assets", tmp_path, settings(patterns=None))
    names = {path.relative_to(out / "files").as_posix() for path in (out / "files").rglob("*") if path.is_file()}
    assert names == set(MODEL) - {"pytorch_model.bin", "model.onnx"}


@pytest.mark.parametrize("patterns", [None, PATTERNS, ["model*.safetensors"]])
def test_a_model_of_pickles_is_refused(hub: FakeHub, tmp_path: Path, patterns: list[str] | None) -> None:
    hub.add("model", "o/m", {name: data for name, data in MODEL.items() if name != "model.safetensors"})
    with pytest.raises(UserError, match=r"models/o/m@.*as pickles only") as caught:
        run("assets", tmp_path, settings(patterns=patterns))
    assert "pytorch_model.bin" in str(caught.value)
    assert not hub.downloads("pytorch_model.bin")


@pytest.mark.parametrize(
    ("patterns", "says"), [(["pytorch_model.bin"], "pickles are not loaded"), (["*.gguf"], "no file matches")]
)
def test_bad_patterns(hub: FakeHub, tmp_path: Path, patterns: list[str], says: str) -> None:
    hub.add("model", "o/m", MODEL)
    with pytest.raises(UserError, match=says):
        run("assets", tmp_path, settings(patterns=patterns))


def test_a_tokenizer_of_a_model_of_pickles_is_fine(hub: FakeHub, tmp_path: Path) -> None:
    hub.add("model", "o/m", {name: data for name, data in MODEL.items() if name != "model.safetensors"})
    out = run("assets", tmp_path, settings(patterns=["tokenizer.json", "special_tokens_map.json"]))
    assert [path.name for path in (out / "files").iterdir()] == ["tokenizer.json"]


def test_faults_give_the_same_bytes_or_nothing(hub: FakeHub, tmp_path: Path, waits: list[float]) -> None:
    hub.add("model", "o/m", MODEL)
    clean = digests(run("assets", tmp_path / "clean", settings()))
    hub.fail("*/model.safetensors", drop_after=100_000, times=3)
    hub.fail("*/config.json", status=503, times=2)
    hub.fail("*/tokenizer.json", content=b"[]", times=-1)
    with pytest.raises(UserError, match=r"tokenizer.json: the content is not what was announced"):
        run("assets", tmp_path / "again", settings())
    assert not (tmp_path / "again/work/out/asset.json").exists()
    hub.faults.clear()
    hub.requests.clear()
    assert digests(run("assets", tmp_path / "again", settings())) == clean
    assert [request.path.rsplit("/", 1)[1] for request in hub.requests] == ["tokenizer.json"], "the rest was kept"


def test_a_web_file(hub: FakeHub, tmp_path: Path) -> None:
    hub.files["v1/data.zip"] = b"content"
    given = {"kind": "url", "url": f"{hub.url}/files/v1/data.zip", "sha256": hashlib.sha256(b"content").hexdigest()}
    out = run("assets", tmp_path, {**given, "name": "nltk/data.zip"})
    assert (out / "files/nltk/data.zip").read_bytes() == b"content"
    for wrong, says in (({"sha256": "0" * 64}, "not what was announced"), ({"url": "http://example.org/x"}, "https")):
        with pytest.raises(UserError, match=says):
            run("assets", tmp_path / "2", {**given, "name": "data.zip", **wrong})
    with pytest.raises(UserError, match="leads out"):
        run("assets", tmp_path / "3", {**given, "name": "../data.zip"})


def test_a_data_set_for_a_task(hub: FakeHub, tmp_path: Path) -> None:
    hub.add(
        "dataset", "o/n", {"README.md": b"---\n---", "wiki/test-0.parquet": b"PAR1", "wiki/train-0.parquet": b"PAR1x"}
    )
    out = run("assets", tmp_path, settings(repo="o/n", repo_type="dataset", patterns=["README.md", "wiki/test-*"]))
    assert sorted(result(out / "asset.json")["files"]) == ["README.md", "wiki/test-0.parquet"]
