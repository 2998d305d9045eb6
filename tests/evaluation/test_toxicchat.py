"""Moderation: verdicts, scores, and what stands beside accuracy on a set of which nine tenths are harmless."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline_lib.config.errors import UserError
from pipeline_lib.data.prompts import CATEGORIES, chat_ids
from pipeline_lib.evaluation.run import Session
from pipeline_lib.evaluation.tasks.toxicchat import average_precision, f1, figures, open_task, verdict
from pipeline_lib.models.checkpoint import load_tokenizer
from tests.chat import chat_model, dataset, teach

MESSAGES = [
    "the cat hurts nobody",
    "bombs kill people",
    "trees grow",
    "the people kill the cat",
    "nobody bombs trees",
    "people kill",
]
LABELS = ["0", "1", "0", "1", "0", "1"]


def conversation(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "text", "text": text}]}]


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learnt to judge these very messages, in the layout of Llama Guard's answers."""
    folder = chat_model(tmp_path_factory.mktemp("guard"), scale=1.0)
    tokenizer = load_tokenizer(folder)
    pairs = []
    for text, label in zip(MESSAGES, LABELS, strict=True):
        said = "\n\nunsafe\nS5<|eot|>" if label == "1" else "\n\nsafe<|eot|>"
        answer = tokenizer(said, add_special_tokens=False)["input_ids"]
        pairs.append((chat_ids(tokenizer, conversation(text), CATEGORIES), answer))
    teach(folder, pairs, steps=160)  # type: ignore[arg-type]
    return folder


@pytest.fixture(scope="module")
def messages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dataset(tmp_path_factory.mktemp("toxicchat"), {"text": MESSAGES, "toxicity": LABELS})


def arm_settings(**decoding: Any) -> dict[str, Any]:
    task = {"type": "toxicchat", "dataset": "toxicchat", "decoding": {"max_new_tokens": 12, **decoding}}
    return {"task": task, "transform": [], "fault_seeds": [], "seed": 0, "dtype": "float32"}


def test_end_to_end(guard: Path, messages: Path) -> None:
    inputs = {"checkpoint": guard, "dataset": messages}
    arm = Session().evaluate(arm_settings(), inputs, None, {})
    found = {name: figures["mean"] for name, figures in arm.result["metrics"].items()}
    assert found["accuracy"] == found["f1"] == found["auprc"] == found["recall"] == 1.0
    assert found["always_safe_accuracy"] == found["random_auprc"] == 0.5
    assert found["unparsable"] == found["without_score"] == 0
    assert found["accuracy_low"] < 1 <= found["accuracy_high"] + 1e-9
    answers = arm.evaluator["clean"]["answers"]
    assert [row["verdict"] for row in answers] == ["unsafe" if label == "1" else "safe" for label in LABELS]
    assert all((row["p_unsafe"] > 0.5) == (row["label"] == 1) for row in answers)
    looked = Session().evaluate(arm_settings(prompt_lookup=3), inputs, None, {})
    for one, other in zip(looked.evaluator["clean"]["answers"], answers, strict=True):
        assert one["verdict"] == other["verdict"], "lookup changes no verdict and no probability"
        assert one["p_unsafe"] == pytest.approx(other["p_unsafe"], rel=1e-4)
    assert looked.result["metrics"]["acceptance_length"]["mean"] >= 1


def test_a_model_that_says_neither_is_counted_apart(tmp_path: Path, messages: Path) -> None:
    arm = Session().evaluate(arm_settings(), {"checkpoint": chat_model(tmp_path), "dataset": messages}, None, {})
    found = {name: figures["mean"] for name, figures in arm.result["metrics"].items()}
    assert found["unparsable"] == len(MESSAGES)
    assert found["accuracy"] == found["f1"] == 0.0, "no verdict is a wrong one"
    assert found["without_score"] == 0, "probabilities of the two words there are all the same"


def test_messages_beyond_the_context_have_no_verdict(tmp_path: Path) -> None:
    texts = dataset(tmp_path / "data", {"text": ["cat " * 500, "trees grow"], "toxicity": ["1", "0"]})
    arm = Session().evaluate(arm_settings(), {"checkpoint": chat_model(tmp_path / "model"), "dataset": texts}, None, {})
    assert arm.result["metrics"]["without_score"]["mean"] == 1
    assert arm.evaluator["clean"]["answers"][0]["p_unsafe"] is None


def test_errors(tmp_path: Path, messages: Path) -> None:
    with pytest.raises(UserError, match=r"no such column\n(.|\n)*columns: \[flagged\]"):
        open_task({"label": "flagged"}, {"dataset": messages}, tmp_path)
    with pytest.raises(UserError, match="no test split"):
        open_task({}, {"dataset": dataset(tmp_path / "train", {"text": ["x"]}, split="train")}, tmp_path)
    with pytest.raises(UserError, match="neither 0 nor 1"):
        open_task({}, {"dataset": dataset(tmp_path / "odd", {"text": ["x"], "toxicity": ["maybe"]})}, tmp_path)
    with pytest.raises(UserError, match="no chat template"):
        inputs = {"checkpoint": chat_model(tmp_path / "plain", chat=False), "dataset": messages}
        Session().evaluate(arm_settings(), inputs, None, {})


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("\n\nsafe", "safe"), ("\n\nunsafe\nS1,S2", "unsafe"), ("Safe \n", "safe"), ("unsafe", "unsafe"),
        ("safely", "neither"), ("I think safe", "neither"), ("", "neither"), ("\n\n", "neither"), ("unsafe.", "neither"),
    ],
)  # fmt: skip
def test_verdicts_are_whole_first_lines(answer: str, expected: str) -> None:
    """Not what follows a fixed number of characters, as the source cuts its answers."""
    assert verdict(answer) == expected


def test_always_safe_does_not_look_good() -> None:
    """On a set with 7 % toxic messages: 93 % accuracy, and everything else says that nothing was found."""
    labels = [1] * 7 + [0] * 93
    metrics, _ = figures(labels, ["safe"] * 100, [0.5] * 100)
    assert metrics["accuracy"] == metrics["always_safe_accuracy"] == 0.93
    assert metrics["f1"] == metrics["recall"] == metrics["precision"] == 0.0
    assert metrics["auprc"] == pytest.approx(metrics["random_auprc"]) == pytest.approx(0.07)


def test_figures_against_scikit_learn() -> None:
    from sklearn import metrics as theirs

    draw = np.random.default_rng(3)
    for _ in range(20):
        labels = draw.random(80) < 0.3
        scores = np.round(draw.random(80) * 0.6 + labels * 0.3, 1)  # with ties
        flagged = scores > 0.5
        assert average_precision(labels, scores) == pytest.approx(theirs.average_precision_score(labels, scores))
        assert f1(labels, flagged) == pytest.approx(theirs.f1_score(labels, flagged))


def test_intervals() -> None:
    """Wilson's interval by hand (n = 10, 8 right), and intervals that hold the value and repeat."""
    labels, said = [1, 0] * 5, ["unsafe", "safe"] * 4 + ["safe", "unsafe"]
    scores = [0.9, 0.1, 0.8, 0.2, 0.7, 0.3, 0.9, 0.2, 0.4, math.nan]
    metrics, errors = figures(labels, said, scores, seed=1)
    assert metrics["accuracy"] == 0.8
    assert metrics["accuracy_low"] == pytest.approx(0.4902, abs=1e-4)
    assert metrics["accuracy_high"] == pytest.approx(0.9433, abs=1e-4)
    assert metrics["f1_low"] <= metrics["f1"] <= metrics["f1_high"]
    assert errors["auprc"] >= 0
    assert metrics["without_score"] == 1
    assert figures(labels, said, scores, seed=1) == (metrics, errors)
