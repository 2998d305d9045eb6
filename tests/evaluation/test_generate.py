"""Generation: what is drawn, what faults it meets, and that neither batches nor torch's generator move it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline_lib.artifacts.files import read_json
from pipeline_lib.artifacts.job import Job
from pipeline_lib.config.errors import UserError
from pipeline_lib.config.validate import validate
from pipeline_lib.evaluation.base import Subject
from pipeline_lib.evaluation.decoding import Sampling, choose, decode
from pipeline_lib.evaluation.records import read_records, write_records
from pipeline_lib.evaluation.run import Session
from pipeline_lib.evaluation.tasks.generate import Settings
from pipeline_lib.stages import evaluate
from pipeline_lib.transforms.apply import apply
from tests.evaluation.conftest import JITTER, WORDS

PROMPTS = ["the model", "bit flips of weight memory", "energy", "a tensor reads noise", "row key", "value of the sum"]
TASK = {"type": "generate", "prompts": PROMPTS, "max_new_tokens": 12}
FLIPS = [{"type": "bitflip", "weight": {"p": 2**-9, "zero_out": 8.0}, "input": {"p": 2**-9, "zero_out": 30.0}}]


@pytest.fixture(scope="module")
def session() -> Session:
    return Session()


@pytest.fixture(scope="module")
def clean(session: Session, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like the evaluate artifact of the clean arm."""
    folder = tmp_path_factory.mktemp("clean")
    write_records(folder, session.evaluate(asked(), {"checkpoint": checkpoint}, None, {}).records)
    return folder


@pytest.fixture
def subject(checkpoint: Path) -> Iterator[Subject]:
    from pipeline_lib.models.checkpoint import load_model, load_tokenizer

    model = load_model(checkpoint)
    applied = apply(model, FLIPS, seed=3)
    yield Subject(model, load_tokenizer(checkpoint), applied.context, 8)
    applied.remove()


def asked(transform: list[dict[str, Any]] | None = None, seeds: tuple[int, ...] = (), **task: Any) -> dict[str, Any]:
    """Settings of the stage evaluate."""
    settings = {"task": {**TASK, **task}, "transform": transform or [], "fault_seeds": list(seeds)}
    return {**settings, "seed": 0, "dtype": "float32"}


def texts(records: list[dict[str, Any]]) -> list[str]:
    return [record["text"] for record in records]


# -- sampling ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(0.6, 50, 0.9), (1.0, None, 1.0), (1.7, 6, 0.7), (0.5, None, 0.5), (1.0, 1, 1.0)],
)
def test_tokens_are_drawn_from_what_transformers_would_draw_from(
    temperature: float, top_k: int | None, top_p: float
) -> None:
    """χ² of 40,000 draws against the probabilities that transformers' own warpers leave."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits_BV = torch.randn(1, 64, generator=torch.Generator().manual_seed(0)) * 2
    ids: Any = torch.zeros(1, 1, dtype=torch.int64)
    warped: Any = TemperatureLogitsWarper(temperature)(ids, logits_BV.clone())
    warped = TopKLogitsWarper(top_k)(ids, warped) if top_k else warped
    warped = TopPLogitsWarper(top_p)(ids, warped) if top_p < 1 else warped
    p_V = warped.softmax(dim=1)[0].double()
    count = 40_000
    drawn_N = choose(logits_BV.expand(count, -1), Sampling(temperature, top_k, top_p), list(range(count)), [0] * count)
    seen_V = torch.bincount(drawn_N, minlength=64).double()
    assert not seen_V[p_V == 0].any()
    often = p_V * count >= 5
    statistic = float((((seen_V - p_V * count) ** 2 / (p_V * count))[often]).sum())
    freedom = int(often.sum()) - 1
    assert statistic <= freedom + 5 * (2 * max(freedom, 1)) ** 0.5


def test_each_prompt_and_token_has_its_own_noise() -> None:
    sampling = Sampling(1.0, None, 1.0)
    flat_BV = torch.zeros(50, 1000)
    by_prompt = choose(flat_BV, sampling, list(range(50)), [0] * 50)
    assert len(set(by_prompt.tolist())) > 40
    by_step = choose(flat_BV, sampling, [0] * 50, list(range(50))).tolist()
    assert by_step == [int(choose(flat_BV[:1], sampling, [0], [step])) for step in range(50)]
    assert len(set(by_step)) > 40
    assert not torch.equal(choose(flat_BV, Sampling(1.0, None, 1.0, (0, 1)), list(range(50)), [0] * 50), by_prompt)


def test_nan_is_never_chosen() -> None:
    """Where the source's multinomial fails on a model full of faults."""
    logits_BV = torch.tensor([[1.0, float("nan"), 2.0], [float("nan")] * 3, [float("inf"), 0.0, -float("inf")]])
    for sampling in (None, Sampling(0.6, 50, 0.9), Sampling(0.6, None, 1.0)):
        for step in range(20):
            first, broken, infinite = choose(logits_BV, sampling, [0, 1, 2], [step] * 3).tolist()
            assert first != 1
            assert broken in (0, 1, 2)
            assert infinite == 0


# -- decoding ----------------------------------------------------------------------------------------------------------


def test_greedy_is_what_transformers_generates(subject: Subject, checkpoint: Path) -> None:
    from pipeline_lib.models.checkpoint import load_model

    plain: Any = load_model(checkpoint)
    tokenizer: Any = subject.tokenizer
    ids = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    found = decode(Subject(plain, tokenizer, None, 8), ids, 12, None)
    for prompt, continuation in zip(ids, found, strict=True):
        output = plain.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=2)[0]
        new = output[len(prompt) :].tolist()
        assert continuation.tokens == [token for token in new if token != tokenizer.eos_token_id]
        assert continuation.finished == (tokenizer.eos_token_id in new)


def test_faults_of_a_step_are_those_of_one_pass_over_all(subject: Subject) -> None:
    """Weights keep their flips from token to token (the source draws them anew), activations go on by position; also
    where a batch holds prompts of several lengths."""
    prompts = [subject.tokenizer(text).input_ids for text in ("the model reads", "the", "bit flips of weight memory")]
    found = decode(subject, prompts, 10, None)
    assert len({len(prompt) for prompt in prompts}) == 3
    for row, index in enumerate(sorted(range(3), key=lambda i: len(prompts[i]))):
        prompt, tokens = prompts[index], found[index].tokens
        assert len(tokens) == 10
        subject.context.begin(0, row)  # type: ignore[union-attr]
        with torch.no_grad():
            logits_TV = subject.model(torch.tensor([prompt + tokens])).logits[0]  # type: ignore[operator]
        assert logits_TV[len(prompt) - 1 : -1].argmax(dim=1).tolist() == tokens


@pytest.mark.parametrize(("max_new_tokens", "rows"), [(8, {4}), (2, {3, 1})])
def test_prompts_of_several_lengths_share_a_batch(
    max_new_tokens: int, rows: set[int], subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as that at most doubles the passes."""
    seen: list[int] = []
    forward = subject.model.forward

    def spy(input_ids: torch.Tensor, **named: Any) -> Any:
        seen.append(len(input_ids))
        return forward(input_ids=input_ids, **named)

    prompts = [[5, 6, 7], [5], [5, 6], [5, 6, 7, 8, 9, 10, 11]]
    alone = [decode(subject, [prompt], max_new_tokens, None)[0] for prompt in prompts[1:2]]
    monkeypatch.setattr(type(subject.model), "forward", lambda self, **named: spy(**named))
    found = decode(subject, prompts, max_new_tokens, None)
    assert set(seen) == rows
    assert len(seen) <= len(rows) * 2 * max_new_tokens
    assert found[1] == alone[0]
    assert all(len(one.tokens) == max_new_tokens or one.finished for one in found)


def test_an_end_token_of_the_generation_configuration_ends_a_text(subject: Subject) -> None:
    ids = [subject.tokenizer(prompt).input_ids for prompt in PROMPTS]
    free = decode(subject, ids, 12, None)
    end = free[0].tokens[4]
    subject.model.generation_config.eos_token_id = [end, 1]  # type: ignore[union-attr]
    cut = decode(subject, ids, 12, None)
    for before, after in zip(free, cut, strict=True):
        assert after.finished == (end in before.tokens or before.finished)
        assert after.tokens == before.tokens[: before.tokens.index(end)] if end in before.tokens else before.tokens


def test_a_text_longer_than_the_positions_is_refused(subject: Subject) -> None:
    with pytest.raises(UserError, match="up to 32 tokens"):
        decode(subject, [[5] * 10], 23, None)


# -- the task ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", [[], FLIPS, JITTER])
def test_the_batch_size_changes_no_text(
    session: Session, checkpoint: Path, clean: Path, transform: list[dict[str, Any]]
) -> None:
    inputs = {"checkpoint": checkpoint, "clean": clean} if transform else {"checkpoint": checkpoint}
    settings = asked(transform, (1, 2) if transform else ())
    found = [session.evaluate(settings, inputs, None, {"eval_batch_size": size}) for size in (1, 2, 16)]
    assert found[0].records == found[1].records == found[2].records
    assert found[0].result == found[2].result


def test_torch_s_generator_is_neither_read_nor_moved(session: Session, checkpoint: Path) -> None:
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        found.append(texts(session.evaluate(asked(), {"checkpoint": checkpoint}, None, {}).records["clean"]))
        assert torch.equal(torch.get_rng_state(), before)
    assert found[0] == found[1]
    other = session.evaluate(asked(seed=1), {"checkpoint": checkpoint}, None, {}).records["clean"]
    assert texts(other) != found[0]


def test_fault_seeds_give_different_texts_and_error_bars(session: Session, checkpoint: Path, clean: Path) -> None:
    inputs = {"checkpoint": checkpoint, "clean": clean}
    arm = session.evaluate(asked(FLIPS, (0, 1, 2)), inputs, None, {})
    assert list(arm.records) == ["seed-0", "seed-1", "seed-2"]
    assert len({tuple(texts(records)) for records in arm.records.values()}) == 3
    assert arm.result["metrics"]["same_tokens"]["stderr"] > 0
    assert arm.result["transform_report"]["histogram"] == {"0:bitflip:*.layer*.*": {"linear": 14}}


def test_no_flips_give_the_clean_texts(session: Session, checkpoint: Path, clean: Path) -> None:
    none = [{"type": "bitflip", "weight": {"p": 0.0}, "input": {"p": 0.0}}]
    arm = session.evaluate(asked(none, (0,)), {"checkpoint": checkpoint, "clean": clean}, None, {})
    assert arm.records["seed-0"] == read_records(clean)["clean"]
    assert arm.result["metrics"]["same_tokens"]["mean"] == 1.0


def test_the_layers_flips_are_not_each_other_s() -> None:
    """Of equal settings on equal shapes, the source flips the same bits in every layer."""
    names = ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.gate_proj")
    masks = [apply_to_ones(name) for name in names]
    assert all(not torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i])
    assert torch.equal(masks[0], apply_to_ones(names[0]))


def apply_to_ones(name: str) -> torch.Tensor:
    """The flipped weight of a layer of that name, all ones before."""
    inner = torch.nn.Linear(64, 64, bias=False)
    torch.nn.init.ones_(inner.weight)
    model = torch.nn.Module()
    parent = model
    *folders, last = name.split(".")
    for folder in folders:
        child = torch.nn.Module()
        parent.add_module(folder, child)
        parent = child
    parent.add_module(last, inner)
    applied = apply(model, [{"type": "bitflip", "weight": {"p_frac": 0.01}, "sites": {"*": {}}}], seed=0)
    applied.context.begin(0, 0)
    return inner(torch.eye(64))


def test_a_model_that_yields_nan_still_writes(session: Session, checkpoint: Path, clean: Path) -> None:
    wild = [{"type": "bitflip", "weight": {"p_exp": 0.1}, "input": {"p_exp": 0.1}}]
    arm = session.evaluate(asked(wild, (0,)), {"checkpoint": checkpoint, "clean": clean}, None, {})
    assert arm.result["metrics"]["not_finite"]["mean"] > 0
    json.dumps(arm.result, allow_nan=False)


def test_the_dtype_asked_for_is_the_one_that_generates(session: Session, checkpoint: Path) -> None:
    """The source is given a dtype and ignores it."""
    arm = session.evaluate({**asked(), "dtype": "bfloat16"}, {"checkpoint": checkpoint}, None, {})
    assert session._checkpoint is not None
    assert session._checkpoint.model.dtype == torch.bfloat16
    assert arm.result["dtype"] == "bfloat16"


def test_prompts_from_documents_have_one_length(session: Session, checkpoint: Path, dataset: Path) -> None:
    settings = asked(prompts=None, dataset="pydocs", documents=4, prompt_tokens=5)
    arm = session.evaluate(settings, {"checkpoint": checkpoint, "dataset": dataset}, None, {})
    tokenizer = session._checkpoint.tokenizer  # type: ignore[union-attr]
    assert [len(tokenizer(record["before"]).input_ids) for record in arm.records["clean"]] == [5] * 4
    with pytest.raises(UserError, match="too few documents"):
        many = asked(prompts=None, dataset="pydocs", documents=400)
        session.evaluate(many, {"checkpoint": checkpoint, "dataset": dataset}, None, {})


def test_a_killed_arm_keeps_its_texts(
    checkpoint: Path, clean: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline_lib.evaluation.tasks.generate import GenerateTask

    inputs, settings = {"checkpoint": checkpoint, "clean": clean}, asked(FLIPS, (0, 1))
    whole = Session().evaluate(settings, inputs, tmp_path, {})
    monkeypatch.setattr(GenerateTask, "run", None)  # what is noted is not made again
    assert Session().evaluate(settings, inputs, tmp_path, {}).records == whole.records


def test_the_stage_writes_records(checkpoint: Path, clean: Path, tmp_path: Path, no_network: list[Any]) -> None:
    job = Job(
        "evaluate", "x", "f" * 64, asked(FLIPS, (0, 1)), {"checkpoint": checkpoint, "clean": clean},
        tmp_path / "work", tmp_path / "out", {},
    )  # fmt: skip
    evaluate.run(job)
    assert {path.name for path in (tmp_path / "out" / "records").iterdir()} == {"seed-0.jsonl", "seed-1.jsonl"}
    assert not (tmp_path / "out" / "evaluator").exists()
    result = read_json(tmp_path / "out" / "result.json")["result"]
    assert result["n_samples"] == len(PROMPTS)
    assert set(result["inputs"]) == {"checkpoint"}
    assert no_network == []


def test_a_chat_needs_a_template_and_ends_where_the_answer_begins(session: Session, checkpoint: Path) -> None:
    settings = asked(prompts=["the"], max_new_tokens=1, chat_template=True, system="a")
    with pytest.raises(UserError, match="no chat template"):
        session.evaluate(settings, {"checkpoint": checkpoint}, None, {})
    template = (
        "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }};{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    session._checkpoint.tokenizer.chat_template = template  # type: ignore[union-attr]
    try:
        records = session.evaluate(settings, {"checkpoint": checkpoint}, None, {}).records["clean"]
    finally:
        session._checkpoint.tokenizer.chat_template = None  # type: ignore[union-attr]
    assert records[0]["before"] == "s:a;u:the;a:"


# -- settings ----------------------------------------------------------------------------------------------------------


def test_prompts_come_from_files(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("London is\n\nThe sum of\n")
    (tmp_path / "p.jsonl").write_text('{"prompt": "London is", "id": 1}\n{"text": "The sum of"}\n')
    expected = Settings(prompts=["London is", "The sum of"])
    for name in ("p.txt", "p.jsonl"):
        settings = Settings(file=str(tmp_path / name))
        assert settings == expected, "what a file says counts, not where it lies"
        assert Settings.model_validate(settings.semantic()) == settings
    (tmp_path / "p.txt").write_text("London was\n")
    assert Settings(file=str(tmp_path / "p.txt")) != expected


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, ["exactly one of `prompts`, `file` and `dataset`"]),
        ({"prompts": ["a"], "dataset": "pydocs"}, ["exactly one"]),
        ({"prompts": ["a"], "file": "p.txt"}, ["either `prompts` or `file`"]),
        ({"file": "no-such.txt"}, ["no-such.txt", "No such file"]),
        ({"file": "config.yaml"}, [".txt and .jsonl"]),
        ({"prompts": []}, ["prompts"]),
        ({"prompts": ["a"], "temperature": 0}, ["temperature", "greater than 0"]),
        ({"prompts": ["a"], "top_p": 1.2}, ["top_p"]),
        ({"prompts": ["a"], "system": "s"}, ["chat_template"]),
        ({"prompts": ["a"], "top_q": 1}, ["top_q", "did you mean"]),
    ],
)
def test_wrong_settings_are_told_while_planning(given: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        validate(Settings, given, "config.yaml: tasks.generate")
    for word in ["config.yaml: tasks.generate", *words]:
        assert word in str(error.value)


def test_the_sampling_defaults_are_those_that_published_texts_used() -> None:
    settings = Settings(prompts=WORDS[:1])
    assert (settings.do_sample, settings.temperature, settings.top_k, settings.top_p) == (True, 0.6, 50, 0.9)
    assert settings.max_new_tokens == 100
