"""The dataset stage on a hub repository."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline_lib.config.errors import UserError
from pipeline_lib.config.pins import lock_key, pinned
from pipeline_lib.data.pins import pin
from tests.data.files import texts
from tests.data.jobs import dataset_settings, digests, result, run
from tests.hub import FakeHub

README = b"""---
configs:
- config_name: small
  default: true
  data_files:
  - split: train
    path: small/*.parquet
  - split: validation
    path: [small-valid/a.jsonl]
- config_name: large
  data_files: large/**
---
# A card
"""


def parquet(texts: list[str]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": texts, "score": list(range(len(texts)))}), sink, row_group_size=7)
    return sink.getvalue()


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


FILES = {
    "README.md": README,
    "small/0.parquet": parquet([f"small zero {i}" for i in range(40)]),
    "small/1.parquet": parquet([f"small one {i}" for i in range(40)]),
    "small/deeper/2.parquet": parquet(["not matched by a star"]),
    "small-valid/a.jsonl": jsonl([f"valid {i}" for i in range(10)]),
    "large/x/y/0.parquet": parquet([f"large {i}" for i in range(30)]),
}
REPO = {"type": "hub", "repo": "o/n"}


@pytest.fixture
def repo(hub: FakeHub) -> FakeHub:
    hub.add("dataset", "o/n", FILES)
    return hub


def test_default_configuration(repo: FakeHub, tmp_path: Path) -> None:
    out = run("dataset", tmp_path, dataset_settings(REPO))
    assert sorted(texts(out)) == sorted(f"small {n} {i}" for n in ("zero", "one") for i in range(40))
    made = result(out / "dataset.json")
    assert sum(made["documents"].values()) == 80
    assert made["source"]["revision"] == repo.branches["dataset", "o/n"]
    assert list(made["source"]["files"]) == ["small/0.parquet", "small/1.parquet"]
    assert not list((tmp_path / "work/source/files").iterdir()), "downloads are not kept twice"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"config": "large"}, [f"large {i}" for i in range(30)]),
        ({"files": ["small/1.parquet"]}, [f"small one {i}" for i in range(40)]),
        ({"files": ["**/2.parquet", "small-valid/*"]}, [*(f"valid {i}" for i in range(10)), "not matched by a star"]),
    ],
)
def test_choosing_files(repo: FakeHub, tmp_path: Path, settings: dict[str, Any], expected: list[str]) -> None:
    out = run("dataset", tmp_path, dataset_settings({**REPO, **settings}))
    assert sorted(texts(out)) == sorted(expected)


def test_the_repositorys_own_splits(repo: FakeHub, tmp_path: Path) -> None:
    source = {**REPO, "split": {"train": "train", "valid": "validation"}}
    out = run("dataset", tmp_path, dataset_settings(source))
    assert texts(out, "valid") == [f"valid {i}" for i in range(10)]
    assert len(texts(out, "train")) == 80
    assert texts(out, "test") == []


def test_a_repository_without_a_list_goes_by_file_names(hub: FakeHub, tmp_path: Path) -> None:
    hub.add("dataset", "o/n", {"en/train-0.jsonl": jsonl(["a"] * 30), "de/train-0.jsonl": jsonl(["b"]), "x.txt": b"c"})
    assert set(texts(run("dataset", tmp_path / "1", dataset_settings({**REPO, "config": "en"})))) == {"a"}
    assert set(texts(run("dataset", tmp_path / "2", dataset_settings(REPO)))) == {"a", "b"}


def test_only_as_much_as_is_needed_is_fetched(repo: FakeHub, tmp_path: Path) -> None:
    out = run("dataset", tmp_path, dataset_settings(REPO, max_bytes=150))
    kept = texts(out)
    assert sorted(kept) == sorted(f"small zero {i}" for i in range(len(kept)))
    assert sum(map(len, kept)) >= 150 > sum(map(len, kept)) - len("small zero 10")
    assert repo.downloads("small/0.parquet")
    assert not repo.downloads("small/1.parquet")


def test_further_columns(repo: FakeHub, tmp_path: Path) -> None:
    out = run("dataset", tmp_path, dataset_settings({**REPO, "columns": ["score"], "files": ["small/0.parquet"]}))
    table = pq.read_table(out / "train-00000.parquet")
    assert table.schema.names == ["id", "text", "score"]
    for row in table.to_pylist():
        assert row == {
            "id": f"small/0.parquet:{row['score']}",
            "text": f"small zero {row['score']}",
            "score": row["score"],
        }


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"config": "smal"}, "did you mean 'small'"),
        ({"split": "test"}, "no such split"),
        ({"files": ["none/*.parquet"]}, "no file of a known format matches"),
        ({"files": ["README.md*"]}, "no file of a known format matches"),
        ({"text": "body"}, "no such column"),
        ({"text": "score"}, "holds no text"),
        ({"repo": "o/absent"}, "status 401"),
        ({"revision": "v9"}, "no such revision"),
    ],
)
def test_errors_name_the_repository(repo: FakeHub, tmp_path: Path, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        run("dataset", tmp_path, dataset_settings({**REPO, **settings}))
    assert str(caught.value).startswith("datasets/o/")
    assert not list((tmp_path / "work/out").iterdir())


def test_interrupted_and_truncated_downloads_give_the_same_bytes(
    repo: FakeHub, tmp_path: Path, waits: list[float]
) -> None:
    clean = digests(run("dataset", tmp_path / "clean", dataset_settings(REPO)))
    repo.fail("*/small/0.parquet", drop_after=200, times=2)
    repo.fail("*/small/1.parquet", truncate=50)
    repo.fail("*/small/1.parquet", status=503)
    repo.fail("*/README.md", status=429, headers={"Retry-After": "2"})
    assert digests(run("dataset", tmp_path / "again", dataset_settings(REPO))) == clean
    assert [request.range for request in repo.downloads("0.parquet")][1:] == [None, "bytes=200-", "bytes=400-"]


def test_a_failed_download_goes_on_later(repo: FakeHub, tmp_path: Path, waits: list[float]) -> None:
    clean = digests(run("dataset", tmp_path / "clean", dataset_settings(REPO)))
    repo.fail("*/small/1.parquet", status=404)
    with pytest.raises(UserError, match=r"small/1.parquet: no such file: status 404"):
        run("dataset", tmp_path / "again", dataset_settings(REPO))
    repo.requests.clear()
    assert digests(run("dataset", tmp_path / "again", dataset_settings(REPO))) == clean
    assert not repo.downloads("small/0.parquet"), "a unit that was finished is not fetched again"


def test_changed_content_at_a_pinned_revision(repo: FakeHub, tmp_path: Path) -> None:
    commit = repo.branches["dataset", "o/n"]
    repo.fail("*/small/1.parquet", content=parquet(["other text"] * 40), times=-1)
    with pytest.raises(UserError, match="not what was announced"):
        run("dataset", tmp_path, dataset_settings({**REPO, "revision": commit}))
    assert not list((tmp_path / "work/out").iterdir())


def test_pins_are_asked_from_the_hub(repo: FakeHub, tmp_path: Path) -> None:
    model = repo.add("model", "o/m", {"config.json": b"{}"})
    lock, data = tmp_path / "hub.lock.json", repo.branches["dataset", "o/n"]
    pin([("dataset", "o/n", "main"), ("model", "o/m", "main"), ("model", "o/m", "a" * 40)], lock)
    assert json.loads(lock.read_text()) == {
        lock_key("dataset", "o/n", "main"): data,
        lock_key("model", "o/m", "main"): model,
    }
    assert pinned("dataset", "o/n", "main", lock) == data
    before = lock.read_bytes()
    with pytest.raises(UserError, match="status 401"):
        pin([("dataset", "o/n", "main"), ("model", "o/absent", "main")], lock)
    assert lock.read_bytes() == before
