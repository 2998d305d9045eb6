"""What a stage asks and tells Slurm, against stand-ins of its commands; tests/cluster has the real ones."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline_lib.artifacts.locks import exclusive
from pipeline_lib.config.plan import Plan
from pipeline_lib.stages import allocation, runner, slurm, wiring
from tests.conftest import ROOT

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


PREEMPTED = "JobState=COMPLETING Reason=None PreemptEligibleTime=2026-11-29T03:56:28 PreemptTime=2026-11-29T03:56:30"
"""As Slurm 22.05 shows a job while it stops for a preemption after which it is not put back (PreemptMode=CANCEL)."""
CANCELLED = "JobState=COMPLETING Reason=None PreemptEligibleTime=2026-11-29T03:56:31 PreemptTime=None"


@pytest.mark.parametrize("stopped", [False, True])
def test_a_job_whose_artifact_another_is_at_gives_its_node_back(
    stopped: bool, fake: Fake, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After some patience; and when Slurm stops it while it waits."""
    fake.say("scontrol", "JobState=RUNNING Reason=None PreemptTime=None")
    artifact = fake.folder / "results" / "store" / "train" / "a-0123456789ab"
    monkeypatch.setattr(runner, "read_spec", lambda stage, name: {"stage": stage, "fingerprint": "f"})
    monkeypatch.setattr(runner, "lock_file", lambda path: fake.folder / "a.lock")
    monkeypatch.setattr(runner, "PATIENCE_S", 60.0 if stopped else 0.3)
    if stopped:
        threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    with exclusive(fake.folder / "a.lock", "x"):
        assert runner.run_stage(artifact / "manifest.json") == runner.EXIT_STOPPED
    assert fake.calls("scontrol") == ["show job 42 --oneliner", "requeue 42"]
    assert "another process (pid" in capsys.readouterr().err


@pytest.mark.parametrize(("code", "words"), [(0, "requeued"), (1, "could not be requeued")])
@pytest.mark.parametrize("shown", ["JobState=RUNNING Reason=None PreemptTime=None", PREEMPTED])
def test_requeues_its_own_job(
    shown: str, code: int, words: str, fake: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also what Slurm preempts and would not put back: the executor would wait for it for ever."""
    fake.say("scontrol", shown)
    script = fake.folder / "scontrol"
    script.write_text(script.read_text().replace("exit 0", f"[ $1 = requeue ] && exit {code}\nexit 0"))
    slurm.requeue()
    assert fake.calls("scontrol") == ["show job 42 --oneliner", "requeue 42"]
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "shown", [CANCELLED, CANCELLED.replace("None", "TimeLimit", 1), "JobState=COMPLETED", "JobState=PENDING", ""]
)
def test_what_slurm_ends_itself_is_not_requeued(shown: str, fake: Fake) -> None:
    """Somebody cancelled it, it met its limit, or Slurm has requeued it itself."""
    fake.say("scontrol", shown)
    slurm.requeue()
    assert fake.calls("scontrol") == ["show job 42 --oneliner"]


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
        f"11|PENDING|{fake.folder}|rule_data_tokenizer_tokens",
    ]
    fake.say("squeue", "\n".join(lines))
    found = slurm.orphans(fake.folder)
    assert [(job.job, sorted(job.stages), job.id, job.state) for job in found] == [
        ("7", ["train"], "pretrain-plain-0123456789ab", "RUNNING"),
        ("10", ["tokens"], "a-b-00", "PENDING"),
        ("11", ["tokenizer", "tokens"], None, "PENDING"),
    ]


class Workflow:
    """What `wiring` reads of a Snakemake that submits to Slurm."""

    is_main_process = True
    executor_plugin = SimpleNamespace(name="slurm")

    def __init__(self, **groups: str) -> None:
        self.group_settings = SimpleNamespace(overwrite_groups=groups)


def test_a_new_job_waits_for_all_that_are_at_its_artifact(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one option, since sbatch heeds the last one only; the members of a group get the same options."""
    names = ("a-0123456789ab", "b-0123456789ab")
    left = [
        slurm.Orphan("7", frozenset(["train"]), names[0], "RUNNING"),
        slurm.Orphan("8", frozenset(["train"]), names[0], "PENDING"),
        slurm.Orphan("9", frozenset(["train"]), names[1], "RUNNING"),
        slurm.Orphan("10", frozenset(["tokenizer", "tokens"]), None, "RUNNING"),
        slurm.Orphan("11", frozenset(["train"]), names[0], "ENDED"),
    ]
    plan = Plan.load(str(ROOT / "config.yaml"))
    monkeypatch.setattr(allocation, "left_behind", lambda: left)
    monkeypatch.setattr(slurm, "is_alive", lambda job: job != "11")

    def options(workflow: Workflow, stage: str, name: str) -> str:
        return allocation.slurm_options(plan, workflow, stage, name)

    assert options(Workflow(), "train", names[0]) == "--dependency=afterany:7:8"
    assert options(Workflow(), "train", names[1]) == "--dependency=afterany:9"
    assert options(Workflow(), "evaluate", names[0]) == ""
    assert options(Workflow(), "tokens", names[0]) == "--dependency=afterany:10"
    data = Workflow(tokenizer="data", tokens="data")
    left.append(slurm.Orphan("12", frozenset(["tokens"]), names[0], "RUNNING"))
    assert {options(data, stage, name) for stage in ("tokenizer", "tokens") for name in names} == {
        "--dependency=afterany:10:12"
    }


def test_what_an_earlier_run_left_behind_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    left = [
        slurm.Orphan("7", frozenset(["train"]), "a-0123456789ab", "RUNNING"),
        slurm.Orphan("8", frozenset(["train"]), "b-0123456789ab", "PENDING"),
        slurm.Orphan("9", frozenset(["tokenizer", "tokens"]), None, "RUNNING"),
    ]
    asked: dict[str, object] = {f"results/store/{path}": None for path in ("train/a-0123456789ab", "tokens/c-00")}
    monkeypatch.setattr(allocation, "left_behind", lambda: left)
    monkeypatch.setattr(wiring, "_asked", asked)
    wiring.tell_left_behind()
    one, other, group = capsys.readouterr().err.splitlines()
    assert "Slurm job 7 (RUNNING) of an earlier run is at train a-0123456789ab; what this run submits" in one
    assert "train b-0123456789ab; this run does not need it: `scancel 8` ends it" in other
    assert "job 9 (RUNNING) of an earlier run is at tokenizer+tokens (a group); what this run submits" in group


@pytest.mark.parametrize(
    ("state", "code", "alive"), [("RUNNING", 0, True), ("PENDING", 0, True), ("TIMEOUT", 0, False), ("", 1, False)]
)
def test_alive(state: str, code: int, alive: bool, fake: Fake) -> None:
    fake.say("squeue", state, code)
    assert slurm.is_alive("7") is alive


@pytest.mark.parametrize(
    ("sbatch", "defaults", "needed"),
    [
        ("/usr/bin/sbatch", {"mem_mb": 1}, True),  # submits, or is a job of one
        (None, {"nodes": 1}, True),  # `-n --profile slurm` on a laptop shows what a cluster would be asked for
        (None, {"mem_mb": 1}, False),
        (None, None, False),
    ],
)
def test_a_plan_for_slurm_holds_what_slurm_reads(
    sbatch: str | None, defaults: dict[str, int] | None, needed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm.shutil, "which", lambda name: sbatch)
    workflow = SimpleNamespace(resource_settings=SimpleNamespace(default_resources=defaults))
    assert allocation.is_for_slurm(workflow) is needed
