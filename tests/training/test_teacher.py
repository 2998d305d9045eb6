"""Sampled answers: seeded record by record, whoever makes them and however often the work is interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline_lib.artifacts.files import read_json
from pipeline_lib.artifacts.job import Job
from pipeline_lib.config.errors import UserError
from pipeline_lib.data.prompts import TeacherData
from pipeline_lib.data.records import read_records
from pipeline_lib.models.checkpoint import load_model, load_tokenizer
from pipeline_lib.training import teacher
from pipeline_lib.training.teacher import InverseSampling, answer, build, uniforms
from tests.chat import chat_model, dataset

DATA = {"n": 10, "max_new_tokens": 12, "prompts": [{"dataset": "d", "min_chars": 20, "prefix_chars": 24}]}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("teacher")
    texts = [f"{'ab' * (n % 5)}trees {n} grow and people wait" for n in range(30)]
    return {"model": chat_model(root / "model", scale=6.0), "dataset-0": dataset(root / "d", {"text": texts}, "train")}


def job(root: Path, inputs: dict[str, Path], data: dict[str, Any] | None = None, **execution: Any) -> Job:
    settings = {"data": TeacherData.model_validate(data or DATA).semantic(), "dtype": "float32"}
    for name in ("work", "out"):
        (root / name).mkdir(parents=True, exist_ok=True)
    execution = {"eval_batch_size": 3, "threads": 1, **execution}
    return Job("teacher", "t", "f" * 64, settings, inputs, root / "work", root / "out", execution)


def made(root: Path, *args: Any, **execution: Any) -> bytes:
    build(job(root, *args, **execution))
    return (root / "out" / "records.jsonl").read_bytes()


def test_records(tmp_path: Path, inputs: dict[str, Path]) -> None:
    made(tmp_path, inputs)
    records = read_records(tmp_path / "out")
    assert len(records) == 10, "the last, smaller batch too"
    for record in records:
        assert set(record) == {"id", "messages", "completion", "prompt_ids", "completion_ids", "metadata"}
        assert record["messages"] == [{"role": "user", "content": record["messages"][0]["content"]}]
        ended = record["completion_ids"][-1] == 2
        assert record["metadata"]["finished"] == ended, "an end token stands only where the teacher ended by itself"
        assert 2 not in record["completion_ids"][:-1]
        assert ended or len(record["completion_ids"]) == 12
        assert "<|eot|>" not in record["completion"]
    result = read_json(tmp_path / "out" / "teacher.json")["result"]
    assert result["records"] == result["asked_for"] == 10
    assert result["completion_tokens"] == sum(len(record["completion_ids"]) for record in records)


def test_batch_size_and_workers_change_no_byte(tmp_path: Path, inputs: dict[str, Path]) -> None:
    alone = made(tmp_path / "a", inputs)
    assert made(tmp_path / "b", inputs, processes=2) == alone
    assert made(tmp_path / "c", inputs, eval_batch_size=1) == alone
    assert made(tmp_path / "d", inputs, eval_batch_size=10) == alone
    other = made(tmp_path / "e", inputs, {**DATA, "seed": 7})
    assert other != alone


KILLED = """
import os, signal, sys
from pathlib import Path
from pipeline_lib.artifacts.job import Job
from pipeline_lib.training import teacher
count, write = 0, teacher.write_bytes
def write_bytes(path, data):
    global count
    count += 1
    if count == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, data)
teacher.write_bytes = write_bytes
teacher.build(Job.load(Path(sys.argv[1])))
"""


def test_a_killed_stage_goes_on(tmp_path: Path, inputs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    whole = made(tmp_path / "whole", inputs)
    given = job(tmp_path / "killed", inputs)
    given.save(tmp_path / "job.json")
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "job.json")], env={**os.environ}, check=False)
    assert done.returncode == -signal.SIGKILL
    kept = sorted((tmp_path / "killed" / "work" / "batches-of-3").iterdir())
    assert len(kept) == 2
    before = [path.stat().st_mtime_ns for path in kept]
    build(given)
    assert [path.stat().st_mtime_ns for path in kept] == before, "what was there was not made again"
    assert (tmp_path / "killed" / "out" / "records.jsonl").read_bytes() == whole


def test_answers_follow_the_models_distribution(inputs: dict[str, Path]) -> None:
    """First tokens of 4,000 answers against softmax(logits / 0.7), by chi-squared over the likely tokens."""
    model: Any = load_model(inputs["model"])
    settings = TeacherData.model_validate(DATA)
    prompt = [1, 40, 41, 42]
    with torch.no_grad():
        p = torch.softmax(model(torch.tensor([prompt])).logits[0, -1].double() / 0.7, -1).numpy()
    n = 4000
    questions = [{"id": f"q{k}", "prompt_ids": prompt, "room": 1} for k in range(n)]
    found = np.bincount([ids[0] for ids in answer(model, questions, settings, [])], minlength=len(p))
    likely = p * n >= 5
    observed, expected = np.append(found[likely], found[~likely].sum()), np.append(p[likely], p[~likely].sum()) * n
    assert likely.sum() >= 3
    from scipy.stats import chisquare

    assert chisquare(observed, expected).pvalue > 1e-3


def test_the_models_own_sampling_settings_take_no_part(inputs: dict[str, Path]) -> None:
    """Not even the library's default of the 50 most likely tokens."""
    model: Any = load_model(inputs["model"])
    settings = TeacherData.model_validate({**DATA, "temperature": 50.0})
    questions = [{"id": f"q{k}", "prompt_ids": [1, 40], "room": 1} for k in range(400)]
    before = answer(model, questions, settings, [])
    assert len({ids[0] for ids in before}) > 100, "nearly uniform over 340 tokens"
    model.generation_config.top_k, model.generation_config.repetition_penalty = 3, 5.0
    assert answer(model, questions, settings, []) == before


def test_inverse_sampling_at_the_edges() -> None:
    uniform = torch.tensor([[0.0], [0.5], [1 - 2**-53], [0.25]], dtype=torch.float64)
    scores = torch.tensor([[0.0, -torch.inf, 0.0, -torch.inf]]).expand(4, 4)
    chosen = InverseSampling(uniform, 1.0, 3)(torch.zeros(4, 3, dtype=torch.int64), scores).argmax(-1)
    assert chosen.tolist() == [0, 2, 2, 0], "never a token of probability 0"


def test_uniforms_are_the_records_own() -> None:
    assert np.array_equal(uniforms(1, "a", 5), uniforms(1, "a", 9)[:5])
    assert not np.array_equal(uniforms(1, "a", 5), uniforms(1, "b", 5))
    assert not np.array_equal(uniforms(1, "a", 5), uniforms(2, "a", 5))


def test_prompts_without_room(tmp_path: Path, inputs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    short = chat_model(tmp_path / "short", positions=12)
    wide = {**DATA, "prompts": [{"dataset": "d", "min_chars": 20, "prefix_chars": 10}]}
    made(tmp_path / "some", {**inputs, "model": short}, wide)
    for record in read_records(tmp_path / "some" / "out"):
        assert len(record["prompt_ids"]) + len(record["completion_ids"]) <= 12
    tight = {**DATA, "prompts": [{"dataset": "d", "min_chars": 20, "prefix_chars": 24}]}
    with pytest.raises(UserError, match="leaves the teacher room"):
        made(tmp_path / "none", {**inputs, "model": chat_model(tmp_path / "tiny", positions=4)}, tight)
    assert "prompts fill the teacher's 4 positions and are left out" in capsys.readouterr().err


def test_records_are_one_line_each(tmp_path: Path, inputs: dict[str, Path]) -> None:
    made(tmp_path, inputs, {**DATA, "temperature": 3.0})
    lines = (tmp_path / "out" / "records.jsonl").read_bytes().split(b"\n")
    assert lines.pop() == b""
    assert [json.loads(line)["id"] for line in lines] == [r["id"] for r in read_records(tmp_path / "out")]


def test_an_answer_that_repeats_its_prompt_is_kept_whole(
    tmp_path: Path, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What follows the prompt's tokens, special ones too: no text is searched for the prompt and cut."""
    special = 3

    def echo(model: Any, questions: list[dict[str, Any]], settings: TeacherData, ends: list[int]) -> list[list[int]]:
        return [[*q["prompt_ids"], special, *q["prompt_ids"], ends[0]] for q in questions]

    monkeypatch.setattr(teacher, "answer", echo)
    made(tmp_path, inputs)
    tokenizer = load_tokenizer(inputs["model"])
    for record in read_records(tmp_path / "out"):
        prompt = tokenizer.decode(record["prompt_ids"])
        assert record["completion"] == f"{prompt}<|user|>{prompt}"
        assert record["messages"][0]["content"] in record["completion"]


def test_a_prompt_may_hold_the_token_that_pads(inputs: dict[str, Path]) -> None:
    """Shorter prompts of a batch are padded with an end token; one that a prompt holds itself is read."""
    model: Any = load_model(inputs["model"])
    settings = TeacherData.model_validate(DATA)
    ids = [[1, 40, 2, 0, 41, 2, 42], [1, 40, 41, 42], [1, *range(40, 60)]]
    questions = [{"id": f"q{k}", "prompt_ids": prompt, "room": 12} for k, prompt in enumerate(ids)]
    together = answer(model, questions, settings, [2])
    for question, found in zip(questions, together, strict=True):
        assert answer(model, [question], settings, [2]) == [found]
    with torch.no_grad():
        logits_V = model(torch.tensor([ids[0]])).logits[0, -1]
    mass_V = torch.softmax(logits_V.double() / settings.temperature, -1).cumsum(-1)
    many = [{"id": f"p{k}", "prompt_ids": ids[0], "room": 1} for k in range(40)]
    for question, (token,) in zip(many, answer(model, many, settings, [2]), strict=True):
        wanted = uniforms(settings.seed, question["id"], 1)[0] * mass_V[-1]
        assert token == int((mass_V <= wanted).sum()), "the whole prompt was read"
