"""Several sources as one: order, ids, rows that become a document, identity."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from pipeline_lib.config.errors import UserError
from pipeline_lib.data.sources.joined import Settings
from tests.data.jobs import result, run


def local(path: Path, texts: list[str]) -> dict[str, str]:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return {"type": "local", "path": str(path)}


def test_two_sources_are_read_as_one(tmp_path: Path) -> None:
    sentences = local(tmp_path / "a.jsonl", [f"s{i}" for i in range(5)])
    articles = local(tmp_path / "b.jsonl", ["one", "two"])
    given = {"type": "joined", "sources": [sentences, articles], "rows": [2, 1]}
    source = Settings.model_validate(given).resolved().semantic()
    assert [part["type"] for part in source["sources"]] == ["local", "local"]
    settings = {"source": source, "split": {"valid": 0, "test": 0}, "max_bytes": None, "seed": 0}
    out = run("dataset", tmp_path / "job", settings)
    table = [pq.read_table(path).to_pydict() for path in sorted(out.glob("train-*.parquet"))]
    assert [text for part in table for text in part["text"]] == ["s0 s1", "s2 s3", "s4", "one", "two"]
    ids = [key for part in table for key in part["id"]]
    assert len(set(ids)) == 5
    assert result(out / "dataset.json")["documents"]["train"] == 5


def test_impossible_parts_are_refused(tmp_path: Path) -> None:
    one = local(tmp_path / "a.jsonl", ["x"])
    for wrong in ({"type": "joined", "sources": [one]}, {"path": "x"}, {"type": "locla"}):
        with pytest.raises(ValidationError, match=r"no source|unknown dataset source"):
            Settings.model_validate({"type": "joined", "sources": [wrong]})
    with pytest.raises(UserError, match="not one number for each source"):
        Settings.model_validate({"type": "joined", "sources": [one, one], "rows": [1]}).check("here")
    with pytest.raises(UserError, match=r"here\.sources\.0"):
        Settings.model_validate({"type": "joined", "sources": [{**one, "path": "nowhere.jsonl"}]}).check("here")
