"""Task validate: loss of masked tokens with fixed masks, of next tokens, by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from pipeline_lib.config.errors import UserError
from pipeline_lib.evaluation.base import Subject
from pipeline_lib.evaluation.ranges import windows
from pipeline_lib.evaluation.run import Session
from pipeline_lib.evaluation.tasks.validate import Settings, Validation, _ratio_error
from pipeline_lib.models.checkpoint import load_model, load_tokenizer
from tests.evaluation.test_finetuning import encoder  # noqa: F401  (a fixture)

SMALL = {"dataset": "stories", "split": "test", "seq_len": 16}


def subject(folder: Path, batch_size: int = 3) -> Subject:
    return Subject(load_model(folder), load_tokenizer(folder), None, batch_size)


def task(dataset: Path, **more: Any) -> Validation:
    return Validation(Settings.model_validate({**SMALL, **more}), dataset)


def test_next_token_loss_by_hand(checkpoint: Path, dataset: Path) -> None:
    given, one = task(dataset), subject(checkpoint)
    text_BT = windows(given._texts, one.tokenizer, None, 17)
    with torch.no_grad():
        logits = one.model(input_ids=text_BT[:, :-1]).logits
    expected = F.cross_entropy(logits.flatten(0, 1), text_BT[:, 1:].flatten())
    found = given.run(one, 0)
    assert found.metrics["loss"] == pytest.approx(float(expected), rel=1e-5)
    assert found.metrics["perplexity"] == pytest.approx(float(expected.exp()), rel=1e-5)
    assert found.metrics["accuracy"] == pytest.approx(float((logits.argmax(-1) == text_BT[:, 1:]).double().mean()))
    assert (found.n_samples, found.conditions["targets"]) == (len(text_BT), 16 * len(text_BT))


def test_masked_loss_is_of_the_hidden_tokens(encoder: Path, dataset: Path) -> None:
    one, given = subject(encoder), task(dataset)
    input_BT, label_BT = given._examples(one)
    hidden = label_BT != -100
    text_BT = windows(given._texts, one.tokenizer, None, 16)
    assert torch.equal(torch.where(hidden, label_BT, input_BT), text_BT), "labels are the text, the rest is shown"
    special: Any = one.tokenizer
    assert not torch.isin(text_BT[hidden], torch.tensor(special.all_special_ids)).any()
    assert 0.08 < float(hidden.double().mean()) < 0.22
    with torch.no_grad():
        logits = one.model(input_ids=input_BT).logits
    expected = F.cross_entropy(logits[hidden], label_BT[hidden])
    assert given.run(one, 0).metrics["loss"] == pytest.approx(float(expected), rel=1e-5)


def test_masks_are_fixed(encoder: Path, dataset: Path) -> None:
    """Whatever the evaluation's seed or batch size; another mask seed is another evaluation."""
    runs = [task(dataset).run(subject(encoder, size), seed) for size, seed in ((3, 0), (5, 1))]
    assert runs[0].conditions == runs[1].conditions
    assert runs[0].metrics["loss"] == pytest.approx(runs[1].metrics["loss"], rel=1e-6)
    other = task(dataset, mask_seed=1).run(subject(encoder), 0)
    assert other.conditions["labels"] != runs[0].conditions["labels"]


def test_the_published_mean_is_over_micro_batches(
    encoder: Path,
    dataset: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The last one counts as much as a full one."""
    monkeypatch.setattr("pipeline_lib.evaluation.tasks.validate.MICRO_BATCH", 4)
    one, given = subject(encoder), task(dataset, sequences=5, mask_rate=0.5)
    input_BT, label_BT = given._examples(one)
    with torch.no_grad():
        logits = one.model(input_ids=input_BT).logits
    parts = [F.cross_entropy(logits[at].flatten(0, 1), label_BT[at].flatten()) for at in (slice(0, 4), slice(4, 5))]
    mended = given.run(one, 0).metrics["loss"]
    published = task(dataset, sequences=5, mask_rate=0.5, average="published").run(one, 0).metrics["loss"]
    assert published == pytest.approx(float(sum(parts)) / 2, rel=1e-5)
    assert abs(published - mended) > 1e-4


def test_error_of_a_ratio() -> None:
    """Equal numbers of targets: the standard error of a mean."""
    loss_B, target_B = torch.tensor([1.0, 2.0, 4.0]).double(), torch.tensor([2.0, 2.0, 2.0]).double()
    assert _ratio_error(loss_B, target_B) == pytest.approx(float((loss_B / 2).std() / 3**0.5))


def test_through_the_session_and_under_faults(encoder: Path, dataset: Path) -> None:
    flips = [{"type": "bitflip", "weight": {"p": 0.05, "zero_out": 1.25}, "input": {"p": 0.0, "zero_out": None}}]
    losses = {}
    for name, transform, seeds in (("clean", [], []), ("flipped", flips, [0, 1])):
        settings = {"task": Settings.model_validate(SMALL).semantic(), "transform": transform, "fault_seeds": seeds}
        inputs = {"checkpoint": encoder, "dataset": dataset}
        arm = Session().evaluate({**settings, "seed": 0, "dtype": "float32"}, inputs, None, {"threads": 1})
        losses[name] = arm.result["metrics"]["loss"]
    assert losses["clean"]["n"] == 1
    assert losses["clean"]["sampling_stderr"] > 0
    assert losses["flipped"]["values"][0] != losses["flipped"]["values"][1]


def test_errors_name_what_is_wrong(encoder: Path, dataset: Path) -> None:
    with pytest.raises(UserError, match="longer than the model's positions"):
        task(dataset, seq_len=64).run(subject(encoder), 0)
    with pytest.raises(UserError, match="too little text"):
        task(dataset, sequences=10_000).run(subject(encoder), 0)
