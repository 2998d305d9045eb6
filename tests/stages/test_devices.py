"""Stages on one machine share its GPUs: each is claimed by one stage at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT

CLAIM = """
import json, os, sys, time
from pathlib import Path
from pipeline_lib.stages import devices
devices.LOCKS, devices.POLL_S = Path(sys.argv[1]), 0.05
start = time.monotonic()
mine = devices.claim_gpus(int(sys.argv[2]))
print(json.dumps([mine, os.environ.get("CUDA_VISIBLE_DEVICES"), time.monotonic() - start]), flush=True)
sys.stdin.read()
"""


def claim(folder: Path, wanted: int, **environment: str) -> subprocess.Popen[str]:
    """A process that claims GPUs and keeps them until its input is closed."""
    return subprocess.Popen(
        [sys.executable, "-c", CLAIM, str(folder / "locks"), str(wanted)],
        cwd=ROOT, env={**os.environ, **environment}, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip


def told(process: subprocess.Popen[str]) -> tuple[list[str], str | None, float]:
    """(GPUs, CUDA_VISIBLE_DEVICES, seconds of waiting) of a process, as soon as it has them."""
    assert process.stdout is not None
    gpus, visible, seconds = json.loads(process.stdout.readline())
    return gpus, visible, seconds


def let_go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.close()
    process.wait()


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)


def test_no_two_stages_share_a_gpu(tmp_path: Path) -> None:
    first, second = (claim(tmp_path, 1, CUDA_VISIBLE_DEVICES="3,5") for _ in range(2))
    assert sorted([told(first)[0], told(second)[0]]) == [["3"], ["5"]]
    third = claim(tmp_path, 2, CUDA_VISIBLE_DEVICES="3,5")
    time.sleep(1)
    let_go(first)
    second.kill()  # a claim ends with its process, however it ends
    second.wait()
    gpus, visible, seconds = told(third)
    assert (sorted(gpus), sorted((visible or "").split(","))) == (["3", "5"], ["3", "5"])
    assert seconds > 0.2, "it waited for both"
    let_go(third)


def test_fewer_gpus_than_wanted_are_enough(tmp_path: Path) -> None:
    process = claim(tmp_path, 8, CUDA_VISIBLE_DEVICES="0")
    assert told(process)[:2] == (["0"], "0")
    let_go(process)


def test_gpus_are_found_by_uuid(tmp_path: Path) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nprintf 'GPU-a\\nGPU-b\\n'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
    process = claim(tmp_path, 2, **{**environment, "PATH": f"{tmp_path}:{os.environ['PATH']}"})
    assert told(process)[:2] == (["GPU-a", "GPU-b"], "GPU-a,GPU-b")
    let_go(process)


def test_without_a_gpu_and_inside_slurm_nothing_is_claimed(tmp_path: Path) -> None:
    none = claim(tmp_path, 1, CUDA_VISIBLE_DEVICES="")
    assert told(none)[:2] == ([], "")
    slurm = claim(tmp_path, 1, CUDA_VISIBLE_DEVICES="0,1", SLURM_JOB_ID="7")
    assert told(slurm)[1] == "0,1"
    assert not (tmp_path / "locks").exists()
    let_go(none)
    let_go(slurm)
