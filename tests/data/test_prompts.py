"""Which prompts a teacher gets: seeded choice, mixtures, no prompt twice, templates; and batches of its records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pipeline_lib.config.errors import UserError
from pipeline_lib.data.formats import TableSettings
from pipeline_lib.data.prompts import CATEGORIES, TeacherData, choose, quotas, render
from pipeline_lib.data.records import NO_TARGET, RecordLoader
from pipeline_lib.models.checkpoint import load_tokenizer
from tests.chat import chat_model, dataset


def data(**given: Any) -> TeacherData:
    return TeacherData.model_validate(given)


def texts(count: int, name: str = "t") -> list[str]:
    return [f"{name}{number} " + "trees grow and people wait " * 8 for number in range(count)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return dataset(tmp_path / "corpus", {"text": texts(50)}, "train")


def test_the_choice_is_seeded_and_without_replacement(corpus: Path) -> None:
    """Not a draw from an unseeded generator, under another name on each rank."""
    settings = data(n=20, prompts=[{"dataset": "a", "min_chars": 20}])
    first, again = (choose(settings, {"a": corpus}) for _ in range(2))
    assert first == again
    assert len({prompt.id for prompt in first}) == 20
    other = choose(data(n=20, seed=1, prompts=[{"dataset": "a", "min_chars": 20}]), {"a": corpus})
    assert {prompt.id for prompt in other} != {prompt.id for prompt in first}
    assert first != sorted(first, key=lambda prompt: prompt.id), "shuffled: a share of them is a fair sample"


def test_prefixes(corpus: Path) -> None:
    settings = data(n=1000, prompts=[{"dataset": "a", "prefix_chars": 30, "min_chars": 100, "stride": 50}])
    found = choose(settings, {"a": corpus})
    assert all(len(prompt.text) == 30 for prompt in found)
    assert {int(prompt.id.rsplit(":", 1)[1]) for prompt in found} == {0, 50, 100}
    assert len({prompt.text for prompt in found}) == len(found), "the same piece of many texts is there once"
    everything = choose(settings.model_copy(update={"deduplicate": False}), {"a": corpus})
    assert len(everything) > len(found)


def test_a_dataset_with_too_few_is_taken_whole_and_that_is_said(
    corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = choose(data(n=80, prompts=[{"dataset": "a", "min_chars": 20}]), {"a": corpus})
    assert len(found) == 50
    assert "a (prefix) has 50 different prompts, not 80" in capsys.readouterr().err
    with pytest.raises(UserError, match="no prompts"):
        choose(data(n=5, prompts=[{"dataset": "a", "min_chars": 10_000}]), {"a": corpus})


def test_mixtures_have_their_weights_and_no_prompt_twice(tmp_path: Path, corpus: Path) -> None:
    other = dataset(tmp_path / "other", {"text": [*texts(25), *texts(30, "u")]}, "train")
    mixture = [{"dataset": "a", "min_chars": 20, "weight": 3}, {"dataset": "b", "min_chars": 20}]
    found = choose(data(n=40, prompts=mixture), {"a": corpus, "b": other})
    assert [sum(prompt.dataset == name for prompt in found) for name in "ab"] == [30, 10]
    assert len({prompt.text for prompt in found}) == 40
    assert {prompt.dataset for prompt in found[:10]} == {"a", "b"}, "mixed, not one after the other"


def test_quotas() -> None:
    assert quotas([1, 1, 1], 10) == [4, 3, 3]
    assert quotas([0.7, 0.2, 0.1], 3000) == [2100, 600, 300]
    assert sum(quotas([0.1] * 7, 1000)) == 1000


def test_settings() -> None:
    assert TeacherData.model_validate({"temperature": 0.25}).temperature == 0.25, "a fraction is no error"
    assert data().semantic()["temperature"] == 0.7
    with pytest.raises(ValidationError, match="n 1 is less than the number of entries"):
        data(n=1, prompts=[{}, {}])
    with pytest.raises(ValidationError, match="Extra inputs"):
        data(return_seq_num=2)


def of_row(row: dict[str, Any], template: str, folder: Path) -> Any:
    kept = dataset(folder, {name: [value] for name, value in row.items()}, "train")
    return choose(data(n=1, prompts=[{"dataset": "a", "template": template}]), {"a": kept})[0]


def test_chat_prompts_have_one_bos_and_end_where_the_answer_begins(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(chat_model(tmp_path / "model"))
    prompt = of_row({"text": "people wait", "input": "for trees"}, "instruction", tmp_path / "a")
    ids = render(tokenizer, prompt)
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids) == "<|begin|><|user|>people wait\nfor trees<|eot|><|assistant|>"
    guard = render(tokenizer, of_row({"text": "kill people"}, "guard", tmp_path / "b"))
    shown = tokenizer.decode(guard)
    assert all(f"{key}: {name}\n" in shown for key, name in CATEGORIES.items())
    assert len(CATEGORIES) == 11
    assert "User: kill people<|eot|><|assistant|>" in shown


def test_long_prompts_are_whole(tmp_path: Path) -> None:
    """Never cut on the left, where Llama Guard's template states its task."""
    tokenizer = load_tokenizer(chat_model(tmp_path / "model"))
    ids = render(tokenizer, of_row({"text": "kill people " * 300}, "guard", tmp_path / "a"))
    assert len(ids) > 600
    assert "Task: is the User safe?" in tokenizer.decode(ids[:40])


def test_without_a_chat_template_text_goes_on(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(chat_model(tmp_path / "model", chat=False))
    rows = {"instruction": "do it\nnow\n", "prefix": "x" * 128}
    for template, expected in rows.items():
        row = {"text": "do it", "input": "now"} if template == "instruction" else {"text": "x" * 600}
        ids = render(tokenizer, of_row(row, template, tmp_path / template))
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids[1:]) == expected
    code = of_row({"text": "sort a list"}, "code", tmp_path / "code").plain
    assert code.endswith("### Instruction:\nsort a list\n\n### Response:")
    assert of_row({"text": "1+1"}, "math", tmp_path / "math").plain.endswith("### Response: Let's think step by step.")
    with pytest.raises(UserError, match="no chat template"):
        render(tokenizer, of_row({"text": "kill"}, "guard", tmp_path / "guard"))


def test_csv_files(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('user_input,toxicity\n"one, ""two""\nthree",1\nfour,0\n')
    [table] = TableSettings(text="user_input", columns=["toxicity"]).read(path, "rows.csv")  # type: ignore[call-arg]
    assert table["text"].to_pylist() == ['one, "two"\nthree', "four"]
    assert table["toxicity"].to_pylist() == ["1", "0"]
    path.write_text("user_input,toxicity\none,1,2\n")
    with pytest.raises(UserError, match="line 2: not valid CSV: a row has another number of cells"):
        list(TableSettings(text="user_input").read(path, "rows.csv"))  # type: ignore[call-arg]


# -- records -----------------------------------------------------------------------------------------------------------


def records(folder: Path, lengths: list[tuple[int, int]]) -> Path:
    """Records of these lengths; token ids tell record and place: 100·record + place."""
    lines = []
    for number, (prompt, completion) in enumerate(lengths):
        ids = [100 * (number + 1) + place for place in range(prompt + completion)]
        lines.append(json.dumps({"id": str(number), "prompt_ids": ids[:prompt], "completion_ids": ids[prompt:]}))
    folder.mkdir()
    (folder / "records.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_training_and_validation_records_are_apart(tmp_path: Path) -> None:
    """One split of one order: not two random subsets that overlap."""
    made = records(tmp_path / "r", [(3, 4)] * 25)
    train, valid = (RecordLoader(made, 16, 4, 0, split) for split in ("train", "valid"))
    assert (train.n_sequences, valid.n_sequences) == (20, 5)
    seen = {int(train.pad([k], 7)[0][0, 0]) for k in range(20)} & {int(valid.pad([k], 7)[0][0, 0]) for k in range(5)}
    assert seen == set()


def test_labels_are_shifted_and_prompts_masked(tmp_path: Path) -> None:
    loader = RecordLoader(records(tmp_path / "r", [(3, 4)]), 16, 1, 0, valid_share=0.0)
    inputs, labels = loader.batch(0, 0, 1)
    assert inputs[0, :6].tolist() == [100, 101, 102, 103, 104, 105]
    assert labels[0, :6].tolist() == [NO_TARGET, NO_TARGET, 103, 104, 105, 106]
    assert (labels[0, 6:] == NO_TARGET).all()
    whole = RecordLoader(tmp_path / "r", 16, 1, 0, valid_share=0.0, mask_prompt=False).batch(0, 0, 1)[1]
    assert whole[0, :6].tolist() == [101, 102, 103, 104, 105, 106]
    last = RecordLoader(tmp_path / "r", 16, 1, 0, valid_share=0.0, mask_prompt=False, keep_last=True).batch(0, 0, 1)
    assert last[0][0, :7].tolist() == [100, 101, 102, 103, 104, 105, 106]
    assert last[1][0, 6] == NO_TARGET


def test_long_records_are_cut_and_counted(tmp_path: Path) -> None:
    loader = RecordLoader(records(tmp_path / "r", [(3, 4), (3, 40), (16, 2), (17, 2)]), 16, 1, 0, valid_share=0.0)
    assert (loader.n_sequences, loader.truncated, loader.unusable) == (3, 2, 1)
    assert loader.largest_id == 315 + 1
    with pytest.raises(UserError, match="no teacher record leaves a token"):
        RecordLoader(records(tmp_path / "s", [(17, 2)]), 16, 1, 0, valid_share=0.0)


def test_batches_are_as_long_as_the_longest_of_the_global_batch(tmp_path: Path) -> None:
    """So that a rank's share has the same shape however the batch is shared out, and no record lacks its end."""
    loader = RecordLoader(records(tmp_path / "r", [(3, 4 + 3 * k) for k in range(8)]), 64, 4, 5, valid_share=0.0)
    for step in range(4):
        whole = loader.batch(step, 0, 4)
        for first in range(4):
            for one, other in zip(loader.batch(step, first, 1), whole, strict=True):
                assert one.tolist() == other[first : first + 1].tolist()
    assert sorted(int(k) for step in range(2) for k in loader.sequences(step, 0, 4)) == list(range(8)), "one epoch"
