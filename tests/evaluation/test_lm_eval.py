"""lm-eval by name: the same numbers as its own command line, hub data from assets, generation, errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline_lib.config.errors import UserError
from pipeline_lib.config.registry import TASK_TYPES
from pipeline_lib.evaluation import offline
from pipeline_lib.evaluation.run import Session
from pipeline_lib.evaluation.tasks import lm_eval as plugin
from tests.evaluation import jitter
from tests.evaluation.conftest import JITTER, documents

WIKITEXT = "EleutherAI/wikitext_document_level"
README = """---
configs:
- config_name: wikitext-2-raw-v1
  data_files:
  - split: test
    path: wikitext-2-raw-v1/test-*
  - split: validation
    path: wikitext-2-raw-v1/validation-*
  - split: train
    path: wikitext-2-raw-v1/train-*
---
"""


@pytest.fixture(scope="module")
def asset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder like an artifact of the assets stage, with a stand-in of WikiText."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path_factory.mktemp("asset")
    data = folder / "files" / "wikitext-2-raw-v1"
    data.mkdir(parents=True)
    (folder / "files" / "README.md").write_text(README)
    for split in ("train", "validation", "test"):
        pages = [text.replace(" ", " @-@ ", 1) for text in documents(6, 7)]
        pq.write_table(pa.table({"page": pages}), data / f"{split}-00000.parquet")
    return folder


def wikitext(settings: dict[str, Any], **changes: Any) -> dict[str, Any]:
    task = {"type": "lm_eval", "task": "wikitext", "hub": [{"repo": WIKITEXT}], **changes}
    return {**settings, "task": task}


@pytest.mark.slow
def test_numbers_equal_those_of_the_command_line(
    settings: dict[str, Any],
    checkpoint: Path,
    dataset: Path,
    asset: Path,
    tmp_path: Path,
    no_network: list[Any],
) -> None:
    """Up to rounding: a batch of other sequences or padding adds up in another order."""
    mirror = tmp_path / "mirror"
    (mirror / "errata" / "dataset").mkdir(parents=True)
    (mirror / "errata" / "dataset" / "test-00000.parquet").symlink_to(dataset / "test-00000.parquet")
    offline.link_tree(asset / "files", mirror / WIKITEXT)
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu", "--batch_size", "3"]
    command += ["--model_args", f"pretrained={checkpoint},dtype=float32", "--tasks", "pydocs,wikitext"]
    command += ["--include_path", str(plugin.OURS), "--output_path", str(tmp_path / "theirs")]
    environment = {**os.environ, **offline.VARIABLES, "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, cwd=mirror, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    [written] = (tmp_path / "theirs").rglob("results_*.json")
    theirs = json.loads(written.read_text())["results"]

    session = Session()
    for spec, inputs in ((settings, {"dataset": dataset}), (wikitext(settings), {"asset-0": asset})):
        arm = session.evaluate(spec, {"checkpoint": checkpoint, **inputs}, None, {"eval_batch_size": 5})
        expected = theirs[spec["task"]["task"]]
        for name, figures in arm.result["metrics"].items():
            assert figures["mean"] == pytest.approx(expected[f"{name},none"], rel=1e-6)
        assert len(arm.result["metrics"]) == 3
    assert no_network == []


def test_hub_data_come_from_the_asset(
    settings: dict[str, Any], checkpoint: Path, asset: Path, no_network: list[Any]
) -> None:
    spec = wikitext(settings, limit=4, max_length=16, num_fewshot=0)
    arm = Session().evaluate(spec, {"checkpoint": checkpoint, "asset-0": asset}, None, {})
    assert arm.result["n_samples"] == 4
    assert arm.evaluator["clean"]["max_length"] == 16
    assert no_network == []


def test_needs_names_what_assets_must_fetch() -> None:
    module = TASK_TYPES.load("lm_eval")
    settings = module.Settings.model_validate({"task": "wikitext", "hub": [{"repo": WIKITEXT, "patterns": ["*.md"]}]})
    assert module.needs(settings) == [
        {"repo": WIKITEXT, "repo_type": "dataset", "revision": "main", "patterns": ["*.md"]}
    ]


def test_data_that_are_not_among_the_inputs_are_a_clear_error(
    settings: dict[str, Any], checkpoint: Path, no_network: list[Any]
) -> None:
    spec = {**settings, "task": {"type": "lm_eval", "task": "wikitext"}}
    with pytest.raises(UserError, match=r"(?s)data of lm-eval task wikitext.*hub:"):
        Session().evaluate(spec, {"checkpoint": checkpoint}, None, {})
    assert no_network == []


@pytest.mark.slow
def test_an_unknown_task_is_a_clear_error(settings: dict[str, Any], checkpoint: Path) -> None:
    spec = {**settings, "task": {"type": "lm_eval", "task": "wikitxt"}}
    with pytest.raises(UserError, match="did you mean 'wikitext'"):
        Session().evaluate(spec, {"checkpoint": checkpoint}, None, {})


@pytest.mark.parametrize(
    ("key", "value"),
    [("task", "a/b.yaml"), ("task", ""), ("limit", 2.5), ("limit", 0), ("max_length", 1), ("shots", 3), ("hub", "x/y")],
)
def test_wrong_settings_are_refused(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=key):
        plugin.Settings.model_validate({"task": "pydocs", "dataset": "pydocs", key: value})


def test_a_dataset_goes_with_a_task_of_ours() -> None:
    with pytest.raises(ValueError, match="needs `dataset`"):
        plugin.Settings.model_validate({"task": "documents"})
    with pytest.raises(ValueError, match="brings its own data"):
        plugin.Settings.model_validate({"task": "wikitext", "dataset": "pydocs"})


GENERATE = """
task: continue
dataset_path: errata/dataset
output_type: generate_until
test_split: test
doc_to_text: !function _text.start
doc_to_target: id
generation_kwargs: {until: ["."], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
START = """
def start(doc):
    words = doc["text"].split()
    return " ".join(words[: 1 + len(words) % 3])
"""


@pytest.fixture
def continuations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[Any]]:
    """A generating task, and what each of its runs answered."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "continue.yaml").write_text(GENERATE)
    (folder / "_text.py").write_text(START)
    monkeypatch.setattr(plugin, "OURS", folder)
    answers: list[list[Any]] = []
    real = plugin._digest

    def digest(tasks: list[Any]) -> str:
        answers.append([request.resps[0] for task in tasks for request in task.instances])
        return real(tasks)

    monkeypatch.setattr(plugin, "_digest", digest)
    return answers


def test_faults_in_generation_do_not_depend_on_the_batch_size(
    settings: dict[str, Any], checkpoint: Path, dataset: Path, continuations: list[list[Any]]
) -> None:
    spec = {**settings, "task": {"type": "lm_eval", "task": "continue", "dataset": "pydocs"}}
    noisy = {**spec, "transform": JITTER, "fault_seeds": [3]}
    inputs = {"checkpoint": checkpoint, "dataset": dataset}
    session = Session()
    for spec_, size in ((noisy, 1), (noisy, 4), (spec, 4)):
        jitter.ROWS_SEEN.clear()
        session.evaluate(spec_, inputs, None, {"eval_batch_size": size})
    one, four, clean = continuations
    assert one == four
    assert one != clean
    assert len(one) == 9


def test_the_words_are_counted_as_in_wikitext() -> None:
    from pipeline_lib.evaluation.tasks._documents import process_results

    counted = process_results({"text": " two  wörds\n"}, (-3.0,))
    assert counted["word_perplexity"] == (-3.0, 4)  # lm-eval's wikitext counts the empty ends too
    assert counted["byte_perplexity"] == counted["bits_per_byte"] == (-3.0, 13)
