"""The parts that the engines share: checkpoints, signals, metrics, schedule, shares of a batch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline_lib.artifacts.job import Job
from pipeline_lib.config.errors import UserError
from pipeline_lib.training import checkpoints, signals
from pipeline_lib.training.batching import Sharing, micro_seed
from pipeline_lib.training.checkpoints import checkpoint_name, fault_of, newest_good, prune, seal, step_of
from pipeline_lib.training.metrics import MetricsLog
from pipeline_lib.training.outcome import Tail
from pipeline_lib.training.schedules import lr_factor
from pipeline_lib.training.signals import STARTED_VARIABLE, StopRequest
from tests.conftest import ROOT


def checkpoint(root: Path, step: int) -> Path:
    directory = root / checkpoint_name(step)
    (directory / "part").mkdir(parents=True)
    (directory / "weights.bin").write_bytes(bytes(range(256)) * 4)
    (directory / "part" / "more.json").write_text(f'{{"step": {step}}}')
    seal(directory)
    return directory


def test_the_newest_sealed_checkpoint_is_used(tmp_path: Path) -> None:
    assert newest_good(tmp_path / "none") is None
    for step in (5, 100, 20):
        checkpoint(tmp_path, step)
    (tmp_path / "step-notes").mkdir()
    found = newest_good(tmp_path)
    assert found is not None
    assert step_of(found) == 100
    assert checkpoint_name(7) == "step-000007"
    with pytest.raises(ValueError, match="step-notes"):
        step_of(tmp_path / "step-notes")


DAMAGES = {
    "a flipped byte": lambda path: flip(path / "weights.bin"),
    "truncation": lambda path: os.truncate(path / "weights.bin", 10),
    "growth": lambda path: (path / "weights.bin").open("ab").write(b"x"),
    "a missing file": lambda path: (path / "part" / "more.json").unlink(),
    "an extra file": lambda path: (path / "part" / "extra").write_text(""),
    "an empty seal": lambda path: (path / "seal.json").write_text(""),
    "a flipped byte in the seal": lambda path: flip(path / "seal.json"),
    "another seal": lambda path: (path / "seal.json").write_text("[1]"),
}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_checkpoint_is_set_aside_aloud(damage, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    good, bad = checkpoint(tmp_path, 1), checkpoint(tmp_path, 2)
    damage(bad)
    assert fault_of(bad)
    assert newest_good(tmp_path) == good
    assert "DAMAGED CHECKPOINT" in capsys.readouterr().err
    assert (tmp_path / "damaged-step-000002").is_dir()
    assert not bad.exists()
    damage(checkpoint(tmp_path, 2))
    assert newest_good(tmp_path) == good
    assert (tmp_path / "damaged-step-000002-2").is_dir(), "the first one is kept"


def test_a_checkpoint_torn_by_a_kill_is_removed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, torn = checkpoint(tmp_path, 1), checkpoint(tmp_path, 2)
    (torn / "seal.json").unlink()
    assert newest_good(tmp_path) == good
    assert not torn.exists()
    assert "step-000002: it was never finished" in capsys.readouterr().err


def test_a_seal_cannot_be_torn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the seal covers has reached the disk before the seal appears."""
    directory, synced = tmp_path / "step-000001", []
    directory.mkdir()
    (directory / "weights.bin").write_text("x")
    original = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), original(fd)))
    seal(directory)
    names = [Path(name).name for name in synced]
    assert names.index("weights.bin") < next(i for i, name in enumerate(names) if "seal.json" in name)


def test_prune_keeps_the_newest_and_leaves_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in range(1, 6):
        checkpoint(tmp_path, step)
    prune(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000004", "step-000005"]
    monkeypatch.setattr(checkpoints.shutil, "rmtree", lambda path: (_ for _ in ()).throw(InterruptedError))
    with pytest.raises(InterruptedError):
        prune(tmp_path, 0)
    monkeypatch.undo()
    assert not (tmp_path / "step-000004" / "seal.json").exists(), "half deleted is unfinished, not damaged"
    assert newest_good(tmp_path) == tmp_path / "step-000005", "at least one is kept"


def test_sigterm_is_seen_once_and_the_handler_goes(capsys: pytest.CaptureFixture[str]) -> None:
    former = signal.getsignal(signal.SIGTERM)
    with StopRequest(None) as stop:
        assert not stop.agreed()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.agreed()
        assert stop.agreed()
    assert signal.getsignal(signal.SIGTERM) is former
    assert capsys.readouterr().err.count("SIGTERM: saving") == 1


def test_a_sigterm_during_imports_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "_early", [])
    former = signal.getsignal(signal.SIGTERM)
    try:
        signals.remember_sigterm()
        os.kill(os.getpid(), signal.SIGTERM)
        with StopRequest(None) as stop:
            assert stop.agreed()
    finally:
        signal.signal(signal.SIGTERM, former)


@pytest.mark.parametrize(
    ("limit", "used", "stops"), [(3600, 3479, False), (3600, 3481, True), (100, 79, False), (100, 81, True)]
)
def test_the_clock_leaves_time_to_save(limit: float, used: float, stops: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """120 s before the limit, or a fifth of a short one; counted from the stage's start, not the rank's."""
    monkeypatch.setenv(STARTED_VARIABLE, repr(time.time() - used))
    with StopRequest(limit) as stop:
        assert stop.agreed() is stops


def make_job(tmp_path: Path, **tracking: str) -> Job:
    work, out = tmp_path / "work", tmp_path / "out"
    work.mkdir(exist_ok=True)
    return Job("train", "label", "f" * 64, {"seed": 0}, {}, work, out, {"tracking": tracking})


def test_metrics_are_cut_back_to_the_resumed_step(tmp_path: Path) -> None:
    job = make_job(tmp_path, wandb="off")
    out, work = job.out / "log" / "metrics.jsonl", job.work / "metrics.jsonl"
    log = MetricsLog(out, work, job, 4)
    for step in (1, 2, 3):
        log.log(step, loss=1.0 / step)
    log.close(finished=False)
    assert not out.exists()
    with open(work, "a") as file:
        file.write('{"step": 4, "lo')
    again = MetricsLog(out, work, job, 4, resumed_step=2)
    again.log(3, loss=float("nan"))
    again.log(4, loss=0.25)
    again.close()
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 0.5), (3, None), (4, 0.25)]
    assert all(line["seconds"] >= 0 for line in lines)


WANDB_OFFLINE = """
import os, socket, sys, time
from pathlib import Path
from pipeline_lib.training.metrics import MetricsLog
from tests.training.test_shared import make_job

def look_up(host, *rest, real=socket.getaddrinfo, **named):
    if host in ("localhost", "127.0.0.1", "::1"):
        return real(host, *rest, **named)
    print("looked up", host)
    raise OSError(host)

socket.getaddrinfo = look_up
os.environ.pop("WANDB_MODE")  # which the import of tests.conftest has set
job = make_job(Path(sys.argv[1]), wandb="offline", project="p")
log = MetricsLog(job.out / "log" / "metrics.jsonl", job.work / "metrics.jsonl", job, 2)
log.log(1, loss=1.0)
log.log(2, loss=0.5)
time.sleep(6)  # it would report on itself within five seconds
log.close()
"""


@pytest.mark.slow
def test_wandb_offline_is_kept_with_the_artifact_and_asks_nobody(tmp_path: Path) -> None:
    """In a process of its own: wandb leaves threads behind."""
    command = [sys.executable, "-c", WANDB_OFFLINE, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "looked up" not in done.stdout
    runs = list(make_job(tmp_path).out.glob("log/wandb/offline-run-*/*.wandb"))
    assert len(runs) == 1, done.stderr
    assert ("f" * 16) in runs[0].name


def test_a_failing_wandb_does_not_end_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:  # type: ignore[no-untyped-def]
    import wandb

    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setattr(wandb, "init", lambda **_: (_ for _ in ()).throw(OSError("no room")))
    job = make_job(tmp_path, wandb="offline")
    log = MetricsLog(job.out / "log" / "metrics.jsonl", job.work / "metrics.jsonl", job, 1)
    log.log(1, loss=1.0)
    log.close()
    assert "wandb failed and is off from here on (OSError: no room)" in capsys.readouterr().err
    assert (job.out / "log" / "metrics.jsonl").exists()


def test_schedule_by_hand() -> None:
    """Warm-up (s+1)/(W+1), 1 at s = W, then down to the minimum, which s = steps would reach."""
    linear = [lr_factor(step, 10, 2, "linear", 0.2) for step in range(11)]
    assert linear[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert linear[3] == pytest.approx(0.9)
    assert linear[10] == pytest.approx(0.2)
    assert lr_factor(6, 10, 2, "cosine", 0.0) == pytest.approx(0.5)
    assert lr_factor(9, 10, 2, "constant", 0.0) == 1.0
    assert lr_factor(0, 1, 0, "linear", 0.0) == 1.0


@given(st.integers(1, 400), st.integers(0, 399), st.floats(0, 1), st.sampled_from(["linear", "cosine", "constant"]))
def test_schedule_stays_within_bounds(steps: int, warmup: int, minimum: float, decay) -> None:  # type: ignore[no-untyped-def]
    warmup = min(warmup, steps - 1)
    factors = [lr_factor(step, steps, warmup, decay, minimum) for step in range(steps)]
    assert all(0 < factor <= 1 for factor in factors[: warmup + 1])
    assert factors[:warmup] == sorted(factors[:warmup])
    assert factors[warmup:] == sorted(factors[warmup:], reverse=True)
    assert min(factors[warmup:]) >= minimum - 1e-12


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_every_sequence_is_read_once(world: int, micro: int, accumulation: int) -> None:
    """By some rank in some micro-step, in the order of the contract: first = a·W·b + r·b."""
    total = world * micro * accumulation
    shares = [Sharing.of(total, {"micro_batch": micro}, rank, world) for rank in range(world)]
    read = [first + row for share in shares for first in share.firsts() for row in range(micro)]
    assert sorted(read) == list(range(total))
    assert all(share.accumulation == accumulation for share in shares)
    assert shares[-1].firsts()[-1] == total - micro


def test_a_share_that_does_not_fit_is_refused() -> None:
    assert Sharing.of(8, {}, 1, 2).firsts() == [4]
    assert Sharing.of(8, {"micro_batch": None}, 0, 2).micro_batch == 4
    with pytest.raises(UserError, match=r"run\.micro_batch.*\n.*value: +3\n.*divides global_batch 8"):
        Sharing.of(8, {"micro_batch": 3}, 0, 1)
    with pytest.raises(UserError, match=r"run\.cpu_processes"):
        Sharing.of(8, {}, 0, 3)


def test_micro_seeds_differ() -> None:
    seeds = {micro_seed(seed, step, first) for seed in range(3) for step in range(10) for first in range(10)}
    assert len(seeds) == 300
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_final_loss_is_that_of_the_last_twentieth() -> None:
    tail = Tail(60)
    for step in range(1, 61):
        tail.add(step, float(step))
    assert tail.mean() == 59.0
    assert Tail(60, tail.losses).mean() == 59.0
    short = Tail(3)
    short.add(2, 9.0)
    short.add(3, 1.0)
    assert short.mean() == 1.0
