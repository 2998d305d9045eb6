"""Local files, web files and their formats."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from pipeline_lib.config import hashes
from pipeline_lib.config.errors import UserError
from pipeline_lib.data.sources import local, url
from tests.data.files import LINES, settings, texts, write
from tests.data.jobs import dataset_settings, digests, result, run
from tests.hub import FakeHub


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "a.txt", "a.jsonl.gz", "a.txt.gz", "a.jsonl.zst"])
def test_formats(tmp_path: Path, name: str) -> None:
    source = settings(str(write(tmp_path / name)), separator="\n")
    out = run("dataset", tmp_path / "job", dataset_settings(source))
    assert sorted(texts(out)) == sorted(LINES)
    ids = [i for path in out.glob("*.parquet") for i in pq.read_table(path)["id"].to_pylist()]
    assert sorted(ids) == sorted(f"{name}:{i}" for i in range(50))


def test_a_text_file_is_a_document_by_default(tmp_path: Path) -> None:
    files = [str(write(tmp_path / f"{i}.txt", [f"first {i}", "second"])) for i in range(20)]
    out = run("dataset", tmp_path / "job", dataset_settings(settings(files)))
    assert sorted(texts(out)) == sorted(f"first {i}\nsecond" for i in range(20))


def test_separator_across_read_chunks(tmp_path: Path) -> None:
    pieces = ["x" * (2**20 - 1), "y" * 10, "z" * 3_000_000]
    (tmp_path / "a.txt").write_text("\n\n".join(pieces))
    source = settings(str(tmp_path / "a.txt"), separator="\n\n")
    out = run("dataset", tmp_path / "job", dataset_settings(source, split={"valid": 0, "test": 0}))
    assert texts(out) == pieces


def test_patterns_and_given_splits(tmp_path: Path) -> None:
    for i in range(3):
        write(tmp_path / f"train{i}.jsonl", [f"train {i}"] * 2)
    write(tmp_path / "v.jsonl", ["valid"])
    source = settings({"train": str(tmp_path / "train*.jsonl"), "valid": str(tmp_path / "v.jsonl")})
    out = run("dataset", tmp_path / "job", dataset_settings(source))
    assert texts(out, "train") == ["train 0", "train 0", "train 1", "train 1", "train 2", "train 2"]
    assert texts(out, "valid") == ["valid"]


def test_ids_groups_and_rows_without_text(tmp_path: Path) -> None:
    rows = [{"text": f"t{i}" if i % 3 else None, "n": i, "who": f"w{i // 10}"} for i in range(100)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = settings(str(tmp_path / "a.jsonl"), id="n", group="who")
    out = run("dataset", tmp_path / "job", dataset_settings(source, split={"valid": 0.3, "test": 0.3}))
    assert result(out / "dataset.json")["without_text"] == 34
    where = {}
    for split in ("train", "valid", "test"):
        table = pq.read_table(out / f"{split}-00000.parquet")
        assert table.schema.names == ["id", "text"]
        for name in table["id"].to_pylist():
            where.setdefault(int(name) // 10, set()).add(split)
    assert all(len(splits) == 1 for splits in where.values()), "a group is in one split"
    assert len({split for splits in where.values() for split in splits}) == 3


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "line 2: not valid JSON"),
        ("a.jsonl", b'{"body": "x"}\n', "no such column"),
        ("a.jsonl", b'{"text": 3}\n', "holds no text"),
        ("a.jsonl", b'["x"]\n', "no such column"),
        ("a.json", b'{"text": "x"}', "must hold a list"),
        ("a.json", b"[", "not valid JSON"),
        ("a.txt", b"\xff\xfe\x00", "cannot be read as txt"),
        ("a.parquet", b"PAR1 not really", "cannot be read as parquet"),
        ("a.jsonl.gz", b"\x1f\x8b broken", "cannot be read as jsonl"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfd broken", "cannot be read as jsonl"),
        ("a.jsonl", b"", "no documents for training"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=says) as caught:
        run("dataset", tmp_path / "job", dataset_settings(settings(str(tmp_path / name))))
    assert name in str(caught.value) or "no documents" in says


def test_missing_and_unknown_files_are_found_while_planning(tmp_path: Path) -> None:
    for path, says in (("none.jsonl", "no such file"), ("*.jsonl", "no such file"), ("a.xml", "unknown file format")):
        (tmp_path / "a.xml").touch()
        with pytest.raises(UserError, match=says) as caught:
            settings(str(tmp_path / path))
        assert "config.yaml: datasets.d.source.path" in str(caught.value)
    for wrong in ([], "", {"training": "a.jsonl"}):
        with pytest.raises(ValidationError):
            local.Settings(path=wrong)
    with pytest.raises(ValidationError, match="is read already"):
        local.Settings(path="a.jsonl", columns=["text"])


def test_identity_is_the_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "a.jsonl")
    before, stat = settings("a.jsonl"), path.stat()
    assert before["sha256"] == {"a.jsonl": hashlib.sha256(path.read_bytes()).hexdigest()}
    os.utime(path, (1, 1))
    assert settings("a.jsonl") == before
    for limit in (hashes.ALWAYS_HASHED, 0):  # with 0 the cache of large files is used
        monkeypatch.setattr(hashes, "ALWAYS_HASHED", limit)
        assert settings("a.jsonl") == before
        data = path.read_bytes()
        path.write_bytes(data.replace(b"number 1,", b"number 9,"))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # an edit of equal size that hides in the mtime
        assert settings("a.jsonl") != before
        path.write_bytes(data)
        assert settings("a.jsonl") == before
    assert (tmp_path / "results/.hashes.json").exists()


def test_a_file_that_changed_after_planning_is_refused(tmp_path: Path) -> None:
    source = settings(str(write(tmp_path / "a.jsonl")))
    write(tmp_path / "a.jsonl", ["other"])
    with pytest.raises(UserError, match="changed since it was planned"):
        run("dataset", tmp_path / "job", dataset_settings(source))


def test_the_split_stays_when_the_folder_moves(tmp_path: Path) -> None:
    made = []
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        source = settings(str(write(tmp_path / folder / "a.jsonl")))
        made.append(digests(run("dataset", tmp_path / f"job-{folder}", dataset_settings(source))))
    assert made[0] == made[1]


def test_a_web_file(hub: FakeHub, tmp_path: Path, waits: list[float]) -> None:
    data = write(tmp_path / "a.jsonl").read_bytes()
    hub.files["a.jsonl"] = data
    hub.fail("/files/*", drop_after=100)
    source = url.Settings(url=f"{hub.url}/files/a.jsonl?download=true", sha256=hashlib.sha256(data).hexdigest())
    source.check("config.yaml: datasets.d.source")
    out = run("dataset", tmp_path / "job", dataset_settings(source.resolved().semantic()))
    assert sorted(texts(out)) == sorted(LINES)
    with pytest.raises(UserError, match="not what was announced"):
        run("dataset", tmp_path / "2", dataset_settings({**source.semantic(), "sha256": "0" * 64}))


@pytest.mark.parametrize("address", ["http://example.org/a.jsonl", "https://example.org/a.xml", "example.org/a.jsonl"])
def test_bad_addresses_are_found_while_planning(address: str) -> None:
    with pytest.raises(UserError, match=r"config.yaml: d.source.url: "):
        url.Settings(url=address, sha256="0" * 64).check("config.yaml: d.source")
    with pytest.raises(ValidationError):
        url.Settings(url="https://example.org/a.jsonl", sha256="abc")
