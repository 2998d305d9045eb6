"""Arms: clean and faulty, repeatable, resumable, offline."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pipeline_lib.artifacts.files import read_json
from pipeline_lib.artifacts.job import Job
from pipeline_lib.evaluation import run
from pipeline_lib.evaluation.run import Session
from pipeline_lib.stages import evaluate
from tests.conftest import ROOT
from tests.evaluation import jitter
from tests.evaluation.conftest import JITTER


@pytest.fixture(scope="module")
def session() -> Session:
    return Session()


def faulty(settings: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**settings, "transform": JITTER, "fault_seeds": [0, 1, 2], **changes}


def test_a_clean_arm(session: Session, settings: dict[str, Any], checkpoint: Path, dataset: Path) -> None:
    arm = session.evaluate(settings, {"checkpoint": checkpoint, "dataset": dataset}, None, {})
    perplexity = arm.result["metrics"]["word_perplexity"]
    assert set(arm.result["metrics"]) == {"word_perplexity", "byte_perplexity", "bits_per_byte"}
    assert perplexity["n"] == 1
    assert perplexity["stderr"] is None
    assert perplexity["values"] == [perplexity["mean"]]
    assert perplexity["mean"] > 1
    assert arm.result["n_samples"] == 9
    assert arm.result["fault_seeds"] == []
    assert "date" not in arm.evaluator["clean"]
    assert "date" in arm.provenance["evaluator"]["clean"]


def test_fault_seeds_differ_and_repeat(
    session: Session, settings: dict[str, Any], checkpoint: Path, dataset: Path
) -> None:
    inputs = {"checkpoint": checkpoint, "dataset": dataset}
    clean = session.evaluate(settings, inputs, None, {}).result["metrics"]["word_perplexity"]
    first = session.evaluate(faulty(settings), inputs, None, {}).result["metrics"]["word_perplexity"]
    again = session.evaluate(faulty(settings), inputs, None, {}).result["metrics"]["word_perplexity"]
    assert len(set(first["values"])) == 3
    assert clean["mean"] not in first["values"]
    assert first["stderr"] > 0
    assert first == again
    other = session.evaluate(faulty(settings, fault_seeds=[2]), inputs, None, {}).result["metrics"]["word_perplexity"]
    assert other["values"] == first["values"][2:]  # a seed's draws do not depend on which seeds ran before it
    after = session.evaluate(settings, inputs, None, {}).result["metrics"]["word_perplexity"]
    assert after == clean


def test_faults_do_not_depend_on_the_batch_size(
    session: Session, settings: dict[str, Any], checkpoint: Path, dataset: Path
) -> None:
    inputs = {"checkpoint": checkpoint, "dataset": dataset}
    values = []
    for size in (1, 3, 16):
        arm = session.evaluate(faulty(settings, fault_seeds=[5]), inputs, None, {"eval_batch_size": size})
        values.append(arm.result["metrics"]["word_perplexity"]["mean"])
    assert values[1:] == pytest.approx([values[0]] * 2, rel=1e-4)
    clean = session.evaluate(settings, inputs, None, {}).result["metrics"]["word_perplexity"]["mean"]
    assert abs(values[0] - clean) > 100 * abs(values[0] - values[1])


def test_every_sequence_has_a_row_of_its_own(
    session: Session, settings: dict[str, Any], checkpoint: Path, dataset: Path
) -> None:
    jitter.ROWS_SEEN.clear()
    inputs = {"checkpoint": checkpoint, "dataset": dataset}
    session.evaluate(faulty(settings, fault_seeds=[0]), inputs, None, {"eval_batch_size": 4})
    calls = [(first, rows) for site, role, first, rows in jitter.ROWS_SEEN if site == "lm_head" and role == "input"]
    assert len(calls) > 3
    assert calls[0][0] == 0
    assert all(first + rows == follower for (first, rows), (follower, _) in pairwise(calls))


def test_a_killed_arm_goes_on_from_its_finished_seeds(
    settings: dict[str, Any], checkpoint: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline_lib.evaluation.tasks.lm_eval import LmEvalTask

    real, calls = LmEvalTask.run, []

    def counted(self: LmEvalTask, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, *arguments)

    session = Session()
    inputs = {"checkpoint": checkpoint, "dataset": dataset}
    whole = session.evaluate(faulty(settings), inputs, None, {})
    monkeypatch.setattr(LmEvalTask, "run", counted)
    with pytest.raises(KeyboardInterrupt):
        session.evaluate(faulty(settings), inputs, tmp_path, {})
    note = tmp_path / "seed-1.json"
    note.write_text(note.read_text().replace('"n_samples": 9', '"n_samples": 8'))
    resumed = session.evaluate(faulty(settings), inputs, tmp_path, {})
    assert len(calls) == 3 + 2  # seed 1, whose note is damaged, and seed 2
    assert resumed.result == whole.result


def test_notes_of_other_settings_are_not_believed(
    session: Session, settings: dict[str, Any], checkpoint: Path, dataset: Path, tmp_path: Path
) -> None:
    inputs = {"checkpoint": checkpoint, "dataset": dataset}
    one = session.evaluate(faulty(settings), inputs, tmp_path, {}).result
    weaker = [{**JITTER[0], "amount": 0.01}]
    other = session.evaluate(faulty(settings, transform=weaker), inputs, tmp_path, {}).result
    assert one["metrics"] != other["metrics"]


def test_the_stage_writes_its_artifact_without_a_network(
    settings: dict[str, Any], checkpoint: Path, dataset: Path, tmp_path: Path, no_network: list[Any]
) -> None:
    job = Job(
        "evaluate", "x", "f" * 64, faulty(settings), {"checkpoint": checkpoint, "dataset": dataset},
        tmp_path / "work", tmp_path / "out", {"eval_batch_size": 4, "threads": 1},
    )  # fmt: skip
    evaluate.run(job)
    written = read_json(tmp_path / "out" / "result.json")
    assert written["result"]["metrics"]["bits_per_byte"]["n"] == 3
    assert written["result"]["transform_report"]["histogram"]
    record = read_json(tmp_path / "out" / "evaluator" / "seed-1.json")
    value = record["results"]["pydocs"]["bits_per_byte,none"]
    assert value == written["result"]["metrics"]["bits_per_byte"]["values"][1]
    assert str(tmp_path) not in json.dumps(written["result"])
    assert no_network == []


def test_many_settings_in_one_process(
    session: Session, settings: dict[str, Any], checkpoint: Path, dataset: Path
) -> None:
    inputs = {"checkpoint": checkpoint, "dataset": dataset}

    def bits(given: dict[str, Any]) -> float:
        return session.evaluate(given, inputs, None, {}).result["metrics"]["bits_per_byte"]["mean"]

    means = [bits(faulty(settings, transform=[{**JITTER[0], "amount": i / 10}])) for i in range(4)]
    assert len(set(means)) == 4
    assert means[0] == bits(settings)  # faults of size 0


def test_the_scratch_of_a_process_that_just_begins_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process finds a lock file that is not locked yet, and removes the folder a moment later."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    hold = run.try_hold

    def slowly(path: Path) -> str | None:
        path.touch()
        locks = list(tmp_path.glob(f"errata-evaluate-*/{run.LOCK}"))
        doomed = [lock.parent for lock in locks if not run.is_held(lock)]
        holder = hold(path)
        for left in doomed:
            shutil.rmtree(left)
        return holder

    monkeypatch.setattr(run, "try_hold", slowly)
    made = run._scratch()
    assert run.is_held(Path(made.name) / run.LOCK)


def test_the_scratch_of_a_killed_process_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And that of one that lives is not."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = "import sys, os; from pipeline_lib.evaluation.run import Session; s = Session(); os.kill(os.getpid(), 9)"
    killed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "TMPDIR": str(tmp_path)})
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.glob("errata-evaluate-*")
    mine, other = Session(), Session()
    assert not left.exists()
    assert len(list(tmp_path.glob("errata-evaluate-*"))) == 2
    del mine, other


def test_bit_flips_of_probability_zero_change_nothing(
    session: Session, settings: dict[str, Any], checkpoint: Path, dataset: Path
) -> None:
    inputs = {"checkpoint": checkpoint, "dataset": dataset}

    def values(p: float) -> list[float]:
        flips = [{"type": "bitflip", "input": {"p_frac": p}, "weight": {"p_frac": p}}]
        arm = session.evaluate(faulty(settings, transform=flips, fault_seeds=[0, 1]), inputs, None, {})
        return arm.result["metrics"]["word_perplexity"]["values"]

    clean = session.evaluate(settings, inputs, None, {}).result["metrics"]["word_perplexity"]["mean"]
    assert values(0.0) == [clean, clean]
    assert len({clean, *values(2.0**-10)}) == 3


def test_a_broken_model_scores_infinity(
    session: Session, settings: dict[str, Any], checkpoint: Path, dataset: Path, tmp_path: Path
) -> None:
    enormous = [{"type": "jitter", "amount": 1e6, "roles": ["weight"]}]
    arm = session.evaluate(
        faulty(settings, transform=enormous), {"checkpoint": checkpoint, "dataset": dataset}, tmp_path, {}
    )
    perplexity = arm.result["metrics"]["word_perplexity"]
    assert perplexity["mean"] == "inf"
    assert perplexity["stderr"] is None
    json.dumps(arm.result, allow_nan=False)
    again = session.evaluate(
        faulty(settings, transform=enormous), {"checkpoint": checkpoint, "dataset": dataset}, tmp_path, {}
    )
    assert again.result == arm.result


def test_a_transform_that_writes_to_the_weights_is_caught(
    session: Session, settings: dict[str, Any], checkpoint: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    def vandal(self: Any, model: torch.nn.Module) -> None:
        with torch.no_grad():
            next(model.parameters()).add_(1)

    monkeypatch.setattr(jitter.JitterTransform, "prepare", vandal)
    with pytest.raises(RuntimeError, match="wrote to the weights"):
        Session().evaluate(faulty(settings), {"checkpoint": checkpoint, "dataset": dataset}, None, {})
