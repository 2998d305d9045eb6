"""A stage that stops in good order inside a Slurm job requeues it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline_lib.stages import slurm


def fake_scontrol(folder: Path, code: int) -> Path:
    calls = folder / "calls"
    script = folder / "scontrol"
    script.write_text(f'#!/bin/sh\necho "$@" >> {calls}\nexit {code}\n')
    script.chmod(0o755)
    return calls


@pytest.mark.parametrize(("code", "words"), [(0, "requeued"), (1, "could not be requeued")])
def test_requeues_its_own_job(
    code: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = fake_scontrol(tmp_path, code)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    slurm.requeue()
    assert calls.read_text() == "requeue 42\n"
    assert words in capsys.readouterr().err


def test_outside_slurm_nothing_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_scontrol(tmp_path, 0)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    slurm.requeue()
    assert not calls.exists()
    assert slurm.time_limit_s({"runtime_min": 60}) is None


def test_the_clock_is_the_job_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    assert slurm.time_limit_s({"runtime_min": 60}) == 3600.0
    assert slurm.time_limit_s({}) is None
