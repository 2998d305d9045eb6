"""The standard library as a dataset, and the split."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline_lib.config.errors import UserError
from pipeline_lib.data import splits, stdlib_text
from pipeline_lib.data.sources.pydocs import Settings
from tests.conftest import ROOT
from tests.data.jobs import dataset_settings, digests, result, run

RUN = """
import sys
from itertools import pairwise
from pathlib import Path
from pipeline_lib.data.sources.pydocs import Settings
from tests.data.jobs import dataset_settings, run
run("dataset", Path(sys.argv[1]), dataset_settings(Settings().resolved().semantic()))
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run("dataset", tmp_path_factory.mktemp("pydocs"), dataset_settings(Settings().resolved().semantic()))


def test_another_process_makes_the_same_bytes(made: Path, tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONHASHSEED": "77", "PYTHONPATH": str(ROOT), "TZ": "Asia/Tokyo", "LC_ALL": "C"}
    subprocess.run([sys.executable, "-c", RUN, str(tmp_path)], check=True, env=env, cwd=tmp_path)
    assert digests(tmp_path / "work/out") == digests(made)


def test_english_and_code_are_both_in(made: Path) -> None:
    documents = {row["id"]: row["text"] for path in made.glob("*.parquet") for row in pq.read_table(path).to_pylist()}
    assert sum(map(len, documents.values())) > 4_000_000
    assert "def dumps(" in documents["json/__init__.py:0"]
    assert 'The "yield" statement' in documents["topics/yield:0"]
    left_out = ("test/", "idlelib/", "encodings/", "site-packages/", "_sysconfigdata", "pydoc_data/")
    assert not [name for name in documents if name.startswith(left_out) or "/test/" in name]
    source = Path(os.__file__).read_text(encoding="utf-8")
    pieces = [documents[f"os.py:{n}"] for n in range(len([name for name in documents if name.startswith("os.py:")]))]
    assert "".join(pieces) == source, "a module's pieces are its whole text"
    assert len(pieces) > 1


def test_a_module_is_in_one_split(made: Path) -> None:
    groups: dict[str, set[str]] = {}
    for path in made.glob("*.parquet"):
        for name in pq.read_table(path)["id"].to_pylist():
            groups.setdefault(name.rsplit(":", 1)[0], set()).add(path.name.split("-")[0])
    assert {len(found) for found in groups.values()} == {1}
    assert {split for found in groups.values() for split in found} == {"train", "valid", "test"}


def test_the_interpreter_is_part_of_the_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = Settings().resolved()
    assert here.python == platform.python_version()
    assert here.resolved() == here
    Settings(python="current").check("w")
    with pytest.raises(UserError, match=rf"w.python: .*another interpreter than this one, {here.python}"):
        Settings(python="3.11.999").check("w")
    with pytest.raises(UserError, match="another interpreter"):
        run("dataset", tmp_path, dataset_settings({**here.semantic(), "python": "3.11.999"}))
    with pytest.raises(UserError, match="the library's files differ"):
        run("dataset", tmp_path, dataset_settings({**here.semantic(), "library": "0" * 16}))
    slimmer = [module for module in stdlib_text.modules() if not module[0].startswith("json/")]
    monkeypatch.setattr(stdlib_text, "modules", lambda: slimmer)
    assert Settings().resolved().library != here.library


@given(st.lists(st.integers(0, 400), min_size=1, max_size=12), st.integers(1, 1000))
def test_divided_text_is_whole_and_short(lengths: list[int], limit: int) -> None:
    text = "".join(f"def f{i}():\n    " + "x" * length + "\n" for i, length in enumerate(lengths))
    pieces = stdlib_text.divide(text, stdlib_text._DEFINITION, limit)
    assert "".join(pieces) == text
    longest = max(len(f"def f{i}():\n    ") + length + 1 for i, length in enumerate(lengths))
    assert all(len(piece) <= max(limit, longest) for piece in pieces)
    assert all(len(a) + len(b) > limit for a, b in pairwise(pieces)), "no piece is needlessly small"


def test_shares_are_kept_and_more_documents_move_none() -> None:
    keys = [f"document {i}" for i in range(20_000)]
    hashes = splits.hashes(keys, seed=0)
    bounds = splits.shares({"valid": 0.1, "test": 0.05})
    assert bounds is not None
    assigned = bounds.assign(hashes)
    share = np.bincount(assigned, minlength=3) / len(keys)
    assert np.abs(share - [0.85, 0.1, 0.05]).max() < 4 * np.sqrt(0.1 * 0.9 / len(keys))
    assert (bounds.assign(splits.hashes(keys[::7], seed=0)) == assigned[::7]).all()
    other = bounds.assign(splits.hashes(keys, seed=1))
    assert 0.2 < (other != assigned).mean() < 0.35


@pytest.mark.parametrize("split", [{"valid": 30, "test": 20}, {"valid": 30, "test": 0.05}, {"valid": 0.05, "test": 20}])
def test_numbers_of_documents(split: dict[str, float | int]) -> None:
    hashes = splits.hashes([f"document {i}" for i in range(5000)], seed=3)
    assert splits.shares(split) is None
    bounds = splits.counted(split, np.array_split(hashes, 13), "d")
    counts = dict(zip(("train", "valid", "test"), np.bincount(bounds.assign(hashes), minlength=3), strict=True))
    for name, size in split.items():
        assert counts[name] == size if isinstance(size, int) else abs(counts[name] - 250) < 60
    with pytest.raises(UserError, match="only 25 documents"):
        splits.counted({"valid": 30, "test": 20}, [hashes[:25]], "d")


@pytest.mark.parametrize(("valid", "test", "expected"), [(0, 0, [1, 0, 0]), (1.0, 0, [0, 1, 0]), (0, 1.0, [0, 0, 1])])
def test_all_or_nothing(valid: float, test: float, expected: list[int]) -> None:
    bounds = splits.shares({"valid": valid, "test": test})
    assert bounds is not None
    assigned = bounds.assign(np.array([0, 1, 2**63, 2**64 - 1], np.uint64))
    assert (np.bincount(assigned, minlength=3) == 4 * np.array(expected)).all()


def test_numbers_of_documents_through_the_stage(tmp_path: Path) -> None:
    settings = Settings().resolved().semantic()
    out = run("dataset", tmp_path, dataset_settings(settings, split={"valid": 3, "test": 2}))
    names = {
        split: {name.rsplit(":", 1)[0] for name in pq.read_table(out / f"{split}-00000.parquet")["id"].to_pylist()}
        for split in ("valid", "test")
    }
    assert {split: len(found) for split, found in names.items()} == {"valid": 3, "test": 2}
    assert result(out / "dataset.json")["source"]["python"] == platform.python_version()
