"""Prompt lookup changes the speed and no token; the model's own sampling settings take no part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from pipeline_lib.evaluation.base import Subject
from pipeline_lib.evaluation.greedy import Decoding, greedy
from pipeline_lib.evaluation.tasks.speed import figures, model_bytes
from pipeline_lib.models.checkpoint import end_tokens, load_model, load_tokenizer
from tests.chat import chat_model

SENTENCE = "the cat hurts nobody and the cat hurts nobody and the cat"


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    # Weights so small that it often repeats itself: lookup then finds something.
    folder = chat_model(tmp_path_factory.mktemp("chat"), scale=4.0)
    return Subject(load_model(folder), load_tokenizer(folder), None, 1)


def decoding(**given: Any) -> Decoding:
    return Decoding.model_validate({"max_new_tokens": 40, **given})


def prompts(subject: Subject, count: int = 12) -> list[list[int]]:
    ids = subject.tokenizer(SENTENCE * 2, add_special_tokens=False)["input_ids"]
    return [ids[start : start + 20 + start] for start in range(count)]  # type: ignore[index]


def by_hand(subject: Subject, ids: list[int], count: int) -> list[int]:
    """Greedy decoding without cache or library."""
    found = list(ids)
    with torch.no_grad():
        for _ in range(count):
            found.append(int(subject.model(torch.tensor([found])).logits[0, -1].argmax()))
    return found[len(ids) :]


def test_greedy_is_the_most_likely_token_each_time(subject: Subject) -> None:
    for ids in prompts(subject, 3):
        assert greedy(subject, ids, decoding(max_new_tokens=12), 0).ids == by_hand(subject, ids, 12)


@pytest.mark.parametrize("lookup", [1, 3, 10])
def test_lookup_is_token_identical_in_fp32(subject: Subject, lookup: int) -> None:
    saved = 0
    for ids in prompts(subject):
        plain = greedy(subject, ids, decoding(), 0)
        looked = greedy(subject, ids, decoding(prompt_lookup=lookup), 0)
        assert looked.ids == plain.ids
        assert plain.passes == len(plain.ids) - 1
        assert plain.per_pass == 1.0
        assert looked.passes <= plain.passes
        saved += plain.passes - looked.passes
    assert saved > 0, "some proposals were right, so the equality is about lookup"


def test_lookup_stops_at_the_end_token_too(subject: Subject) -> None:
    for ids in prompts(subject, 6):
        free = greedy(subject, ids, decoding(), 0).ids
        ends = [free[len(free) // 2]]
        plain = greedy(subject, ids, decoding(), 0, ends).ids
        assert plain == free[: free.index(ends[0]) + 1]
        assert greedy(subject, ids, decoding(prompt_lookup=4), 0, ends).ids == plain


def test_the_models_own_sampling_takes_no_part(subject: Subject) -> None:
    """A Llama Guard's own settings sample at 0.6 and 0.9: the comparison would be of dice."""
    own = subject.model.generation_config
    ids = prompts(subject, 1)[0]
    before = greedy(subject, ids, decoding(), 0).ids
    try:
        subject.model.generation_config = GenerationConfig(
            do_sample=True, temperature=5.0, repetition_penalty=3.0, eos_token_id=[2, 7]
        )
        assert end_tokens(subject.model, subject.tokenizer) == [2, 7]
        torch.manual_seed(1)
        assert greedy(subject, ids, decoding(), 0).ids == before
        assert subject.model.generation_config.temperature == 5.0, "put back"
    finally:
        subject.model.generation_config = own


@pytest.mark.parametrize("lookup", [0, 3])
def test_every_token_of_a_prompt_is_read(subject: Subject, lookup: int) -> None:
    """Also those with the ids of padding and of an end: no attention mask is guessed from ids."""
    ids = prompts(subject, 1)[0]
    ids = [*ids[:4], 0, *ids[4:9], 2, 0, *ids[9:]]
    found = greedy(subject, ids, decoding(max_new_tokens=12, prompt_lookup=lookup), 0, ends=[2]).ids
    assert found == by_hand(subject, ids, 12)[: len(found)]
    assert found != greedy(subject, [token for token in ids if token not in (0, 2)], decoding(), 0).ids[: len(found)]


def test_logits_belong_to_the_tokens(subject: Subject) -> None:
    for lookup in (0, 4):
        found = greedy(subject, prompts(subject, 1)[0], decoding(prompt_lookup=lookup), 0, logits=True)
        assert [int(logits.argmax()) for logits in found.logits_NV] == found.ids


def test_answers_end_with_the_context(subject: Subject) -> None:
    ids = (prompts(subject, 1)[0] * 40)[:500]
    assert len(greedy(subject, ids, decoding(), 0).ids) == 12
    with pytest.raises(ValueError, match="fills the model's context"):
        greedy(subject, (ids * 2)[:512], decoding(), 0)


def test_bf16_divergence_is_counted(subject: Subject) -> None:
    """Of two tokens that are nearly alike, a pass over several positions may round to the other: that is a figure."""
    one = greedy(subject, prompts(subject, 1)[0], decoding(), 0)
    other = type(one)([*one.ids[:-1], one.ids[-1] + 1], 5, 0.5, 2.0)
    metrics, _ = figures({"": [one, one], "lookup_": [one, other]})
    assert metrics["lookup_divergence"] == 0.5
    assert metrics["lookup_acceptance_length"] == 2 * (len(one.ids) - 1) / (one.passes + 5)


def test_the_divergence_in_bf16_is_that_of_the_texts(tmp_path: Path, subject: Subject) -> None:
    from pipeline_lib.evaluation.tasks import speed
    from tests.chat import dataset

    folder = chat_model(tmp_path / "model", scale=4.0)
    half = Subject(load_model(folder, "bfloat16"), subject.tokenizer, None, 1)
    texts = dataset(tmp_path / "texts", {"text": [SENTENCE * 12]})
    given = {"max_new_tokens": 30, "prompt_lookup": 6}
    task = speed.open_task(
        {"type": "speed", "dataset": "x", "prompt_tokens": 24, "prompts": 5, "warmup": 1, "decoding": given},
        {"dataset": texts},
        tmp_path,
    )
    outcome = task.run(half, 0)
    asked = task._prompts(half)[1:]
    plain, looked = (
        [greedy(half, ids, decoding(**{**given, "prompt_lookup": lookup}), 0).ids for ids in asked] for lookup in (0, 6)
    )
    differ = sum(one != other for one, other in zip(plain, looked, strict=True))
    assert outcome.metrics["lookup_divergence"] == differ / len(asked)


def test_tied_weights_count_once() -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = torch.nn.Linear(8, 8, bias=False), torch.nn.Linear(8, 8, bias=False)
            self.two.weight = self.one.weight
            self.register_buffer("codes", torch.zeros(10, dtype=torch.uint8))

    assert model_bytes(Tied()) == 8 * 8 * 4 + 10


def test_speed_task(tmp_path: Path, subject: Subject) -> None:
    from pipeline_lib.config.errors import UserError
    from pipeline_lib.evaluation.tasks import speed
    from tests.chat import dataset

    texts = dataset(tmp_path / "texts", {"text": [SENTENCE * 3] * 6 + ["the cat"]})
    settings = {"type": "speed", "dataset": "x", "prompt_tokens": 24, "prompts": 4, "warmup": 2, "profile": True}
    task = speed.open_task(
        {**settings, "decoding": {"max_new_tokens": 10, "prompt_lookup": 3}}, {"dataset": texts}, tmp_path
    )
    outcome = task.run(subject, 0)
    assert outcome.n_samples == 4
    for name in (
        "prefill_s",
        "decode_s_per_token",
        "s_per_token",
        "lookup_decode_s_per_token",
        "lookup_speed_up",
        "peak_memory_mib",
    ):
        assert outcome.metrics[name] > 0, name
    assert outcome.metrics["model_mib"] * 2**20 == sum(p.nbytes for p in subject.model.parameters()) + sum(
        b.nbytes for b in subject.model.buffers()
    )
    for prefix in ("", "lookup_"):
        beside = outcome.metrics[f"{prefix}peak_memory_mib"] - outcome.metrics["model_mib"]
        assert 0 < beside < 30, "of this decoding, not of this process"
    assert outcome.metrics["lookup_divergence"] == 0.0
    assert outcome.metrics["lookup_acceptance_length"] >= 1
    assert '"traceEvents"' in outcome.files["trace.json"]
    assert outcome.host["profile"][0]["calls"] > 0
    asked = speed.Settings.model_validate(settings).semantic()
    assert asked["profile"], "who asks for a trace of a measured model gets one: the task runs again"
    with pytest.raises(UserError, match="pieces of 24 tokens"):
        speed.open_task({**settings, "prompts": 99}, {"dataset": texts}, tmp_path).run(subject, 0)
    with pytest.raises(UserError, match="do not fit"):
        speed.open_task({**settings, "prompt_tokens": 500}, {"dataset": texts}, tmp_path).run(subject, 0)
