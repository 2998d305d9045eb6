"""A Trainer's log keeps its steps and loses no figure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline_lib.__main__ import _parser
from pipeline_lib.cli import track
from pipeline_lib.config.errors import UserError

HISTORY: list[dict[str, Any]] = [
    {"epoch": 0.03, "grad_norm": 89950.0, "learning_rate": 8e-06, "loss": 2064.0, "step": 4},
    {"epoch": 0.03, "eval_loss": 1060.2, "eval_runtime": 31.9, "step": 4},
    {"epoch": 0.07, "grad_norm": float("inf"), "loss": 788.0, "step": 8},
    {"epoch": 1.0, "train_loss": 267.2, "train_runtime": 4607.0, "step": 8},
]


def state(path: Path, history: Any = HISTORY) -> Path:
    path.write_text(json.dumps({"epoch": 1.0, "log_history": history}))
    return path


def run(*arguments: str) -> int:
    return track.run(_parser().parse_args(["track", *arguments]))


def test_every_figure_at_its_step(tmp_path: Path) -> None:
    assert run(str(state(tmp_path / "trainer_state.json"))) == 0
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 8]
    assert lines[0]["loss"] == 2064.0
    assert lines[0]["valid_loss"] == 1060.2
    assert lines[0]["lr"] == 8e-06
    assert lines[1]["grad_norm"] is None, "JSON has no infinity"
    assert lines[1]["train_runtime"] == 4607.0


def test_wandb_gets_the_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    logged: list[tuple[int, dict[str, Any]]] = []
    begun: list[dict[str, Any]] = []

    class Run:
        def __enter__(self) -> Run:
            return self

        def __exit__(self, *_: object) -> None: ...

        def log(self, figures: dict[str, Any], step: int) -> None:
            logged.append((step, figures))

    def init(**given: Any) -> Run:
        begun.append(given)
        return Run()

    monkeypatch.setattr(wandb, "init", init)
    source = str(state(tmp_path / "trainer_state.json"))
    run(source, "--wandb", "offline", "--name", "guard", "--out", str(tmp_path / "m.jsonl"))
    run(source, "--wandb", "offline", "--name", "guard", "--out", str(tmp_path / "m.jsonl"))
    assert [step for step, _ in logged] == [4, 8] * 2
    assert logged[0][1]["loss"] == 2064.0
    assert begun[0]["id"] == begun[1]["id"], "the same file is one run"
    assert (begun[0]["name"], begun[0]["mode"]) == ("guard", "offline")


def test_a_real_offline_run(tmp_path: Path) -> None:
    run(str(state(tmp_path / "trainer_state.json")), "--wandb", "offline")
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_errors(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    for path in (tmp_path / "a.json", tmp_path / "missing.json"):
        with pytest.raises(UserError, match=r"not a trainer_state\.json"):
            track.read_state(path)
    with pytest.raises(UserError, match=r"log_history\[0\].*has no step"):
        track.read_state(state(tmp_path / "b.json", [{"loss": 1.0}]))
