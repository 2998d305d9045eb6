"""Seals, publishing, damage, locks, digests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline_lib.artifacts import store, views
from pipeline_lib.artifacts.digest import digest
from pipeline_lib.artifacts.files import write_json
from pipeline_lib.artifacts.locks import exclusive, is_held
from pipeline_lib.config.errors import UserError
from pipeline_lib.config.fingerprint import canonical, fingerprint

SPEC: dict[str, Any] = {
    "stage": "train",
    "version": 1,
    "label": "x",
    "settings": {},
    "inputs": {},
    "fingerprint": "f" * 64,
}


@pytest.fixture
def artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    out = Path("results/work/x/out")
    (out / "sub").mkdir(parents=True)
    (out / "sub" / "weights.safetensors").write_bytes(os.urandom(1000))
    (out / "log").mkdir()
    (out / "log" / "metrics.jsonl").write_text("{}\n")
    write_json(out / "result.json", {"result": {"loss": 1.0}, "provenance": {"date": "today"}})
    path = Path("results/store/train/x-ffffffffffff")
    path.mkdir(parents=True)  # as Snakemake does
    store.publish(out, path, SPEC)
    return path


def test_published_artifact_is_whole(artifact: Path) -> None:
    assert store.verify(artifact, "f" * 64)["spec"] == SPEC
    assert (artifact / "manifest.json").read_bytes() == (artifact / ".manifest.json").read_bytes()
    assert not Path("results/work/x/out").exists()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize("harm", [flip, truncate, Path.unlink])
@pytest.mark.parametrize("name", ["sub/weights.safetensors", "result.json", ".manifest.json"])
def test_damage_is_found(artifact: Path, name: str, harm: Any) -> None:
    harm(artifact / name)
    with pytest.raises(store.Damaged, match=Path(name).name):
        store.verify(artifact)


def test_another_spec_is_refused(artifact: Path) -> None:
    with pytest.raises(store.Damaged, match="another spec"):
        store.verify(artifact, "0" * 64)


def test_logs_and_manifest_copy_may_change(artifact: Path) -> None:
    (artifact / "log" / "metrics.jsonl").write_text("other")
    (artifact / "manifest.json").unlink()
    store.verify(artifact)


def test_reported_damage_is_set_aside_by_the_next_plan(artifact: Path) -> None:
    flip(artifact / "result.json")
    store.report_damage(artifact, "test")
    assert store.requested()
    store.set_aside_reported()
    assert not artifact.exists()
    assert not store.requested()
    assert len(list(store.QUARANTINE.glob("train--x-*"))) == 1


def test_report_about_a_whole_artifact_leaves_it(artifact: Path) -> None:
    store.report_damage(artifact, "a false alarm")
    store.set_aside_reported()
    store.verify(artifact)


def test_view_is_fresh_by_content(artifact: Path) -> None:
    view = Path("results/e/t.json")
    source = artifact / "result.json"
    assert views.copy_view(source, view, Path("results/specs/none.json"))
    assert views.is_fresh(view, source)
    os.utime(view, (1, 1))
    assert views.is_fresh(view, source), "time stamps must not matter"
    assert not views.is_fresh(view, Path("results/store/train/y-000000000000/result.json"))
    view.write_text(view.read_text() + " ")
    assert not views.is_fresh(view, source)


def test_digest_ignores_provenance_and_logs(artifact: Path) -> None:
    before = digest([artifact])
    write_json(artifact / "result.json", {"result": {"loss": 1.0}, "provenance": {"date": "tomorrow"}})
    (artifact / "log" / "metrics.jsonl").write_text("other")
    assert digest([artifact]) == before
    write_json(artifact / "result.json", {"result": {"loss": 1.5}, "provenance": {}})
    assert digest([artifact]) != before


def test_lock_waits_and_is_freed_by_death(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    code = "import sys, time; from pathlib import Path; from pipeline_lib.artifacts.locks import exclusive\n"
    code += "with exclusive(Path(sys.argv[1]), 'x'):\n print('held', flush=True); time.sleep(60)"
    root = Path(__file__).resolve().parents[2]
    other = subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=root, stdout=subprocess.PIPE)
    assert other.stdout is not None
    assert other.stdout.readline() == b"held\n"
    assert is_held(path)
    other.kill()
    other.wait()
    start = time.monotonic()
    with exclusive(path, "x"):
        assert time.monotonic() - start < 5
        assert is_held(path)


def test_canonical_json() -> None:
    assert canonical({"b": 1, "a": [0.1, None]}) == '{"a":[0.1,null],"b":1}'
    assert fingerprint({"a": 1, "b": 2}) == fingerprint(json.loads('{"b": 2, "a": 1}'))
    for bad in ({"a": float("nan")}, {"a": float("inf")}, {1: 2}, {"a": print}, {"a": {1, 2}}, {"a": Path("x")}):
        with pytest.raises(UserError):
            canonical(bad)
