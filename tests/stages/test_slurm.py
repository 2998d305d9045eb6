"""What a stage asks and tells Slurm, against stand-ins of its commands; tests/cluster has the real ones."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline_lib.stages import slurm

TRAIN = "rule_train_wildcards_pretrain-plain-0123456789ab"


class Fake:
    """Slurm's commands as scripts that note how they were called."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def say(self, command: str, output: str = "", code: int = 0) -> None:
        """Let a command print `output` and end with `code`."""
        script = self.folder / command
        called = f'echo {command} "$@" >> {self.folder}/calls'
        script.write_text(f"#!/bin/sh\n{called}\necho '{output}'\nexit {code}\n")
        script.chmod(0o755)

    def calls(self, command: str) -> list[str]:
        """How a command was called."""
        lines = (self.folder / "calls").read_text().splitlines() if (self.folder / "calls").exists() else []
        return [line.removeprefix(f"{command} ") for line in lines if line.startswith(f"{command} ")]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    former = signal.getsignal(signal.SIGTERM)
    yield Fake(tmp_path)
    signal.signal(signal.SIGTERM, former)


@pytest.mark.parametrize(("code", "words"), [(0, "requeued"), (1, "could not be requeued")])
@pytest.mark.parametrize("state", ["RUNNING", "PREEMPTED", "TIMEOUT"])
def test_requeues_its_own_job(
    state: str, code: int, words: str, fake: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.say("squeue", state)
    fake.say("scontrol", code=code)
    slurm.requeue()
    assert fake.calls("scontrol") == ["requeue 42"]
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETING", "PENDING", ""])
def test_what_somebody_cancelled_stays_cancelled(state: str, fake: Fake) -> None:
    """Nor is a job requeued that Slurm has requeued itself."""
    fake.say("squeue", state)
    fake.say("scontrol")
    slurm.requeue()
    assert fake.calls("scontrol") == []


def test_outside_slurm_nothing_is_asked(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.say("scontrol")
    fake.say("squeue", "1:00")
    monkeypatch.delenv("SLURM_JOB_ID")
    slurm.requeue()
    slurm.name_job("bitflip-nano")
    assert slurm.seconds_left() is None
    assert fake.calls("scontrol") == fake.calls("squeue") == []


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("59:58", 3598), ("0:07", 7), ("1:00:00", 3600), ("2-01:00:03", 176403), ("UNLIMITED", None), ("INVALID", None)],
)
def test_the_clock_is_slurms(text: str, seconds: float | None, fake: Fake) -> None:
    fake.say("squeue", text)
    assert slurm.seconds_left() == seconds


def test_a_silent_slurm_is_told(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    fake.say("squeue", code=1)
    assert slurm.seconds_left() is None
    assert "it stops on SIGTERM only" in capsys.readouterr().err
    with pytest.raises(ConnectionError):
        slurm.orphans(fake.folder)


def test_the_comment_names_the_experiment(fake: Fake) -> None:
    fake.say("squeue", f"{TRAIN}, experiment old")
    fake.say("scontrol")
    slurm.name_job("bitflip-nano")
    assert fake.calls("scontrol") == [f"update JobId=42 Comment={TRAIN}, experiment bitflip-nano"]


def test_orphans_are_jobs_of_this_folder(fake: Fake) -> None:
    lines = [
        f"7|RUNNING|{fake.folder}|{TRAIN}, experiment x",
        f"8|RUNNING|/elsewhere|{TRAIN}",
        f"9|RUNNING|{fake.folder}|(null)",
        f"10|PENDING|{fake.folder}|rule_tokens_wildcards_a-b-00",
    ]
    fake.say("squeue", "\n".join(lines))
    found = slurm.orphans(fake.folder)
    assert [(job.job, job.stage, job.id, job.state) for job in found] == [
        ("7", "train", "pretrain-plain-0123456789ab", "RUNNING"),
        ("10", "tokens", "a-b-00", "PENDING"),
    ]


@pytest.mark.parametrize(
    ("state", "code", "alive"), [("RUNNING", 0, True), ("PENDING", 0, True), ("TIMEOUT", 0, False), ("", 1, False)]
)
def test_alive(state: str, code: int, alive: bool, fake: Fake) -> None:
    fake.say("squeue", state, code)
    assert slurm.is_alive("7") is alive
