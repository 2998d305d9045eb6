"""What CI does with the cluster tests: where it can run them they decide, and where it cannot it says so."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.cluster import __main__ as cluster
from tests.conftest import ROOT

MAKE = """#!/bin/sh
echo "$1" >> "{folder}/made"
case $1 in
  test) exit {tests};;
  test-cluster) [ "$CI" = 1 ] || exit 9; echo 13 passed; exit {cluster};;
esac
"""


@pytest.mark.parametrize(
    ("user", "tests", "cluster", "code", "words"),
    [
        (0, 0, 0, 0, "13 passed"),
        (0, 0, 1, 1, "FAILED: the cluster tests"),
        (0, 2, 0, 2, "13 passed"),
        (0, 2, 1, 1, "FAILED: the cluster tests"),
        (1000, 0, 1, 0, "NOT RUN: the cluster tests, which need root"),
        (1000, 2, 0, 2, "NOT RUN: the cluster tests, which need root"),
    ],
)
def test_the_cluster_tests_decide_where_there_is_root(
    user: int, tests: int, cluster: int, code: int, words: str, tmp_path: Path
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci" / "run")
    make = MAKE.format(folder=tmp_path, tests=tests, cluster=cluster)
    for name, text in {"make": make, "id": f"#!/bin/sh\necho {user}\n", "git": "#!/bin/sh\n"}.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    environment.pop("CI", None)
    done = subprocess.run(
        ["bash", tmp_path / ".ci" / "run"], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == code
    assert words in done.stdout + done.stderr
    assert ("test-cluster" in (tmp_path / "made").read_text().split()) == (user == 0)


@pytest.mark.parametrize(("ci", "code"), [("1", 1), (None, 0)])
def test_without_root_the_cluster_tests_say_that_they_did_not_run(
    ci: str | None, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And fail where CI has promised them."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.delenv("CI", raising=False)
    if ci:
        monkeypatch.setenv("CI", ci)
    assert cluster.main() == code
    assert "NOT RUN: the cluster tests need root" in capsys.readouterr().err
