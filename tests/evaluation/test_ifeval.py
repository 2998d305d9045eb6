"""IFEval end to end on a small chat model and prompts of our own, against lm-eval's own command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from pipeline_lib.config.errors import UserError
from pipeline_lib.evaluation import offline
from pipeline_lib.evaluation.run import Session
from pipeline_lib.evaluation.tasks import ifeval
from tests.chat import adds_bos, chat_model

ASKED: list[tuple[str, str, dict[str, Any]]] = [
    ("Answer without commas.", "punctuation:no_comma", {}),
    ("Write all in lowercase.", "change_case:english_lowercase", {}),
    ("Write at least one word.", "length_constraints:number_words", {"relation": "at least", "num_words": 1}),
    ("Write at most one sentence.", "length_constraints:number_sentences", {"relation": "less than", "num_sentences": 2}),
    ("Say cat twice.", "keywords:frequency", {"keyword": "cat", "frequency": 2, "relation": "at least"}),
    ("Use a capital word.", "change_case:capital_word_frequency", {"capital_relation": "less than", "capital_frequency": 3}),
]  # fmt: skip
README = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: input_data.jsonl\n---\n"
PUNKT = {
    "collocations.tab": "st\tlouis\n", "sent_starters.txt": "the\n", "abbrev_types.txt": "dr\nmr\n",
    "ortho_context.tab": "the\t46\n", "README": "not needed",
}  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("ifeval")
    prompts = root / "prompts" / "files"
    prompts.mkdir(parents=True)
    (prompts / "README.md").write_text(README)
    keys = sorted({key for _, _, kwargs in ASKED for key in kwargs})
    rows = [
        {
            "key": 1000 + n,
            "prompt": text,
            "instruction_id_list": [kind],
            "kwargs": [{key: kwargs.get(key) for key in keys}],
        }
        for n, (text, kind, kwargs) in enumerate(ASKED)
    ]
    (prompts / "input_data.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    punkt = root / "punkt" / "files"
    punkt.mkdir(parents=True)
    with zipfile.ZipFile(punkt / "punkt_tab.zip", "w") as packed:
        for name, text in PUNKT.items():
            packed.writestr(f"punkt_tab/english/{name}", text)
        packed.writestr("punkt_tab/../../outside.txt", "never written")
        packed.writestr("punkt_tab/english/../evil.tab", "never written")
    return {"checkpoint": chat_model(root / "model", scale=3.0), "asset-0": root / "prompts", "asset-1": root / "punkt"}


def arm_settings(**decoding: Any) -> dict[str, Any]:
    task = {"type": "ifeval", "decoding": {"max_new_tokens": 24, **decoding}}
    return {"task": task, "transform": [], "fault_seeds": [], "seed": 0, "dtype": "float32"}


@pytest.fixture(scope="module")
def ours(inputs: dict[str, Path]) -> dict[str, Any]:
    return Session().evaluate(arm_settings(), inputs, None, {"eval_batch_size": 4}).result


def test_strict_and_loose_prompt_and_instruction_level(ours: dict[str, Any]) -> None:
    assert set(ours["metrics"]) >= {
        "prompt_level_strict_acc", "prompt_level_loose_acc", "inst_level_strict_acc", "inst_level_loose_acc"
    }  # fmt: skip
    assert ours["n_samples"] == len(ASKED)
    assert 0 < ours["metrics"]["prompt_level_strict_acc"]["mean"] < 1, "some are followed and some are not"


@pytest.mark.slow
def test_the_command_line_says_the_same(ours: dict[str, Any], inputs: dict[str, Path], tmp_path: Path) -> None:
    mirror = tmp_path / "mirror"
    offline.link_tree(inputs["asset-0"] / "files", mirror / "google" / "IFEval")
    ifeval.install_punkt(inputs["asset-1"] / "files" / "punkt_tab.zip", tmp_path / "nltk")
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu", "--batch_size", "1"]
    command += ["--model_args", f"pretrained={inputs['checkpoint']},dtype=float32", "--tasks", "ifeval"]
    command += ["--apply_chat_template", "--gen_kwargs", "max_gen_toks=24,do_sample=False"]
    command += ["--output_path", str(tmp_path / "theirs")]
    environment = {
        **os.environ,
        **offline.VARIABLES,
        "HF_HOME": str(tmp_path / "home"),
        "NLTK_DATA": str(tmp_path / "nltk"),
    }
    done = subprocess.run(command, cwd=mirror, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    [written] = (tmp_path / "theirs").rglob("results_*.json")
    theirs = json.loads(written.read_text())["results"]["ifeval"]
    for name, figures in ours["metrics"].items():
        assert figures["mean"] == theirs[f"{name},none"], name


def test_lookup_changes_no_answer(ours: dict[str, Any], inputs: dict[str, Path]) -> None:
    looked = Session().evaluate(arm_settings(prompt_lookup=3), inputs, None, {}).result
    assert looked["metrics"] == ours["metrics"]


def test_only_plain_text_of_the_archive_is_unpacked(inputs: dict[str, Path], tmp_path: Path) -> None:
    ifeval.install_punkt(inputs["asset-1"] / "files" / "punkt_tab.zip", tmp_path / "a" / "nltk")
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    expected = ("collocations.tab", "sent_starters.txt", "abbrev_types.txt", "ortho_context.tab")
    assert found == {f"a/nltk/tokenizers/punkt_tab/english/{name}" for name in expected}


def test_errors(inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "punkt_tab.zip", "w") as packed:
        packed.writestr("punkt/english.pickle", "no")
    with pytest.raises(UserError, match="holds no punkt_tab/english"):
        ifeval.install_punkt(tmp_path / "punkt_tab.zip", tmp_path / "nltk")
    monkeypatch.setattr(ifeval, "PACKAGES", ("no_such_package",))
    with pytest.raises(UserError, match=r"needs the package no_such_package(.|\n)*make env"):
        ifeval.open_task({}, inputs, tmp_path)


def test_assets() -> None:
    prompts, punkt = ifeval.needs(ifeval.Settings.model_validate({}))
    assert prompts["repo"] == "google/IFEval"
    assert set(punkt) == {"url", "sha256", "name"}
    assert ifeval.refuses(ifeval.Settings.model_validate({}), "bert") is not None


def test_a_conversation_begins_once_and_ends_where_the_answer_begins(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a tokenizer that puts `bos` before every text itself, beside the one that the chat template writes."""
    from transformers import LlamaForCausalLM

    folder = chat_model(tmp_path / "model", scale=3.0)
    adds_bos(folder)
    seen: list[list[int]] = []
    forward = LlamaForCausalLM.forward

    def spy(self: Any, input_ids: Any = None, **given: Any) -> Any:
        if input_ids.shape[1] > 1:
            rows = given["attention_mask"] if given.get("attention_mask") is not None else input_ids >= 0
            seen.extend(ids[mask.bool()].tolist() for ids, mask in zip(input_ids, rows, strict=True))
        return forward(self, input_ids=input_ids, **given)

    monkeypatch.setattr(LlamaForCausalLM, "forward", spy)
    found = Session().evaluate(arm_settings(max_new_tokens=2), {**inputs, "checkpoint": folder}, None, {}).result
    assert found["n_samples"] == len(seen) == len(ASKED)
    for ids in seen:
        assert (ids.count(1), ids[0], ids[-1]) == (1, 1, 4), "<|begin|> once, and <|assistant|> last"
    assert ifeval.Settings().decoding.max_new_tokens == 1280  # type: ignore[call-arg]
