"""GLUE and SuperGLUE: every data set and metric, the published recipe and its defects, kills, faults."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline_lib.artifacts.files import read_json, write_bytes
from pipeline_lib.config.errors import UserError
from pipeline_lib.evaluation.base import Subject
from pipeline_lib.evaluation.benchmark import cut_longest, encode_rows, read_rows, score, steps_of, warmup_of
from pipeline_lib.evaluation.finetuning import Classifier, FineTuned
from pipeline_lib.evaluation.run import Session
from pipeline_lib.evaluation.tasks import glue, superglue
from pipeline_lib.models import bert
from pipeline_lib.models.checkpoint import load_tokenizer, save_checkpoint
from tests.data.jobs import run
from tests.evaluation.made_benchmarks import repository
from tests.hub import FakeHub

SMALL: dict[str, Any] = {"seq_len": 32, "head_width": 16, "epochs": 1, "lr": 1e-3, "seeds": [0, 1]}


@pytest.fixture(scope="session")
def encoder(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of about 20 k parameters with the tokenizer of the llama, untrained."""
    torch.manual_seed(0)
    model = bert.build({"dim": 16, "layers": 2, "heads": 2, "ffn": 32, "vocab": 300, "max_seq_len": 32})
    folder = tmp_path_factory.mktemp("encoder")
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("cls.predictions.dec")}
    save_checkpoint(folder, model.config, state, load_tokenizer(checkpoint), "BertForMaskedLM")
    return folder


@pytest.fixture(scope="session")
def benchmarks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Assets artifacts of both benchmarks, made by the assets stage from a hub on loopback."""
    found = {}
    with FakeHub() as hub, pytest.MonkeyPatch.context() as patch:
        for name, value in hub.env().items():
            patch.setenv(name, value)
        for name, module in (("glue", glue), ("superglue", superglue)):
            settings = module.Settings()
            commit = hub.add("dataset", settings.repo, repository(module.SETS))
            [need] = module.needs(settings)
            asked = {"kind": "hub", "repo_type": "dataset", **need, "revision": commit}
            found[name] = run("assets", tmp_path_factory.mktemp(name), asked)
        assert not [request for request in hub.requests if "/test-" in request.path], "no test split is fetched"
    return found


def evaluate(task: dict[str, Any], encoder: Path, asset: Path, work: Path | None = None, **more: Any) -> dict[str, Any]:
    settings = {"task": task, "transform": [], "fault_seeds": [], "seed": 0, "dtype": "float32", **more}
    inputs = {"checkpoint": encoder, "asset-0": asset}
    return Session().evaluate(settings, inputs, work, {"threads": 1}).result


def small(module: Any, **more: Any) -> dict[str, Any]:
    return module.Settings.model_validate({**SMALL, **more}).semantic()


def test_glue_is_the_mean_of_nine_scores_over_seeds(encoder: Path, benchmarks: dict[str, Path]) -> None:
    result = evaluate(small(glue), encoder, benchmarks["glue"])
    nine = [
        "cola_mcc",
        "mnli_acc",
        "mnli_acc_extra",
        "mrpc_f1",
        "qnli_acc",
        "qqp_f1",
        "rte_acc",
        "sst2_acc",
        "stsb_pearson",
    ]
    assert result["conditions"]["average_of"] == nine
    assert set(result["metrics"]) == {*nine, "average"}
    for seed in (0, 1):
        values = [result["metrics"][name]["values"][seed] for name in nine]
        assert result["metrics"]["average"]["values"][seed] == pytest.approx(sum(values) / 9)
    average = result["metrics"]["average"]
    assert average["n"] == 2
    assert average["stderr"] == pytest.approx(abs(average["values"][0] - average["values"][1]) / 2)
    assert result["task"]["epoch"] == "last", "the result says which behaviour ran"


def test_superglue_is_the_mean_of_seven(encoder: Path, benchmarks: dict[str, Path]) -> None:
    result = evaluate(small(superglue), encoder, benchmarks["superglue"])
    assert result["conditions"]["average_of"] == sorted(
        ["boolq_acc", "cb_f1", "copa_acc", "multirc_f1_a", "rte_acc", "wic_acc", "wsc.fixed_acc"]
    )


def test_it_learns_what_only_the_last_field_shows(encoder: Path, benchmarks: dict[str, Path]) -> None:
    """And with the published inputs, which drop that field, it cannot."""
    task = {"sets": ["wic"], "epochs": 20, "lr": 3e-3, "seeds": [0], "dropout": 0.0, "batch": 8}
    whole = evaluate(small(superglue, **task), encoder, benchmarks["superglue"])["metrics"]["wic_acc"]["mean"]
    cut = evaluate(small(superglue, **task, fields="published"), encoder, benchmarks["superglue"])
    assert whole >= 0.9
    assert cut["metrics"]["wic_acc"]["mean"] <= 0.75
    assert cut["task"]["fields"] == "published"


# -- the recipe, and its defects ---------------------------------------------------------------------------------------

SIZES = {
    "cola": 8551,
    "mnli": 392702,
    "mrpc": 3668,
    "qnli": 104743,
    "qqp": 363846,
    "rte": 2490,
    "sst2": 67349,
    "stsb": 5749,
}
SUPER = {"boolq": 9427, "cb": 250, "copa": 400, "multirc": 27243, "rte": 2490, "wic": 5428, "wsc.fixed": 554}


def test_steps_of_every_data_set() -> None:
    steps = {name: steps_of(size, glue.Settings()) for name, size in SIZES.items()}
    assert steps == {
        "cola": 2670, "mnli": 122715, "mrpc": 1145, "qnli": 32730, "qqp": 113700, "rte": 775, "sst2": 21045, "stsb": 1795
    }  # fmt: skip
    steps = {name: steps_of(size, superglue.Settings()) for name, size in SUPER.items()}
    assert steps == {
        "boolq": 5890, "cb": 150, "copa": 250, "multirc": 17020, "rte": 1550, "wic": 3390, "wsc.fixed": 340
    }  # fmt: skip


def test_the_defaults_are_the_published_recipe() -> None:
    one, other = glue.Settings(), superglue.Settings()
    assert (one.lr, one.epochs, other.lr, other.epochs) == (4e-5, 5, 5e-5, 10)
    for settings in (one, other):
        assert (settings.betas, settings.eps, settings.weight_decay, settings.batch) == ((0.9, 0.98), 1e-6, 0.0, 16)
        assert (settings.warmup_fraction, settings.seq_len, settings.head_width, settings.dropout) == (
            0.1,
            128,
            1024,
            0.1,
        )
        assert (settings.repo, len(settings.seeds)) in (("nyu-mll/glue", 3), ("aps/super_glue", 3))
        mended = (settings.warmup, settings.fields, settings.first_token, settings.padding, settings.epoch)
        assert mended == ("own", "all", "cls", "masked", "last")


def test_warm_up_leaks_from_the_first_data_set_only_when_asked_to() -> None:
    """CB, COPA and WSC then never leave it: their rate ends at .255, .424 and .577 of the peak."""
    mended, leaking = superglue.Settings(), superglue.Settings(warmup="published")
    steps = {name: steps_of(size, mended) for name, size in SUPER.items()}
    assert {name: warmup_of(own, steps["boolq"], mended) for name, own in steps.items()}["cb"] == 15
    assert {warmup_of(own, steps["boolq"], leaking) for own in steps.values()} == {589}
    cola = steps_of(SIZES["cola"], glue.Settings())
    assert warmup_of(775, cola, glue.Settings(warmup="published")) == 267
    from transformers import get_cosine_schedule_with_warmup

    for name, factor in (("cb", 0.255), ("copa", 0.424), ("wsc.fixed", 0.577)):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        schedule = get_cosine_schedule_with_warmup(optimizer, 589, steps[name])
        for _ in range(steps[name]):
            optimizer.step()
            schedule.step()
        assert schedule.get_last_lr()[0] == pytest.approx(factor, abs=5e-4)


def test_a_leaked_warm_up_reaches_the_training(encoder: Path, benchmarks: dict[str, Path]) -> None:
    task = {"sets": ["cb"], "seeds": [0], "warmup_fraction": 0.9, "epochs": 2}
    [need] = superglue.needs(superglue.Settings.model_validate({**SMALL, **task, "warmup": "published"}))
    assert "boolq/train-*" in need["patterns"], "its steps count, so it is fetched as well"
    works = {
        warmup: FineTuned(
            superglue.Settings.model_validate({**SMALL, **task, "warmup": warmup}), benchmarks["superglue"] / "files"
        )._work("cb", subject(encoder))
        for warmup in ("own", "published")
    }
    assert (works["own"].steps, works["own"].warmup) == (6, 5)
    assert (works["published"].steps, works["published"].warmup) == (6, 3), "of BoolQ's 4 steps"


def subject(folder: Path) -> Subject:
    from pipeline_lib.models.checkpoint import load_model

    return Subject(load_model(folder), load_tokenizer(folder), None, 8)


def test_inputs_by_hand(encoder: Path, benchmarks: dict[str, Path]) -> None:
    tokenizer: Any = load_tokenizer(encoder)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    word = {text: tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("key", "sum", "row")}
    mended, published = superglue.Settings(), superglue.Settings(fields="published", first_token="published")
    one, three = [(("key",), 1.0)], [(("key", "sum", "row"), 0.0)]
    assert encode_rows(one, tokenizer, mended).ids == [[bos, *word["key"], eos]]
    assert encode_rows(one, tokenizer, published).ids == [[*word["key"], eos]], "no first token of its own"
    whole = [bos, *word["key"], eos, *word["sum"], eos]
    assert encode_rows(three, tokenizer, published).ids == [whole], "the third field is dropped"
    assert encode_rows(three, tokenizer, mended).ids == [[*whole, *word["row"], eos]]
    assert cut_longest([[1, 2, 3, 4], [5], [6, 7, 8]], 5) == [[1, 2], [5], [6, 7]]
    rows = read_rows(benchmarks["superglue"] / "files", "copa", superglue.SETS["copa"], "train")
    cut = encode_rows(rows, tokenizer, superglue.Settings(seq_len=12)).ids
    assert {len(ids) for ids in cut} == {12}
    assert all(ids.count(eos) == 4 for ids in cut), "every field keeps its end"


def test_padding_changes_nothing_unless_it_is_attended_to(encoder: Path) -> None:
    torch.manual_seed(0)
    model: Any = subject(encoder).model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8.0 if parameter.ndim > 1 else 1.0)
    classifier = Classifier(model.base_model, 16, 16, 2, 0.0).eval()
    short, mask = torch.tensor([[5, 6, 7]]), torch.tensor([[1, 1, 1, 0, 0]])
    padded = torch.tensor([[5, 6, 7, 2, 2]])
    torch.testing.assert_close(classifier(padded, mask), classifier(short, None))
    assert not torch.allclose(classifier(padded, None), classifier(short, None), atol=1e-4)


def test_the_best_epoch_is_taken_only_when_asked_for(
    encoder: Path, benchmarks: dict[str, Path], tmp_path: Path
) -> None:
    task = {"sets": ["stsb"], "epochs": 4, "lr": 1e-2, "seeds": [0, 1, 2]}
    found = {}
    for epoch in ("last", "published"):
        settings = small(glue, **task, epoch=epoch)
        evaluate(settings, encoder, benchmarks["glue"], tmp_path / epoch)
        found[epoch] = [read_json(tmp_path / epoch / f"clean.stsb-{seed}.json")["outcome"] for seed in task["seeds"]]
    for last, best in zip(found["last"], found["published"], strict=True):
        assert len(best["epochs"]) == 4 and len(last["epochs"]) == 1
        assert best["scores"]["stsb_pearson"] == max(best["epochs"])
        assert last["scores"]["stsb_pearson"] == best["epochs"][-1], "the same training"
    assert any(max(best["epochs"]) > best["epochs"][-1] for best in found["published"])


# -- metrics -----------------------------------------------------------------------------------------------------------


def test_metrics_by_hand() -> None:
    said = np.eye(3)[[0, 1, 1, 2, 0]]
    labels = [0, 1, 2, 2, 1]
    assert score("acc", said, labels) == pytest.approx(3 / 5)
    per_class = [2 / 3, 2 * 1 / (2 + 2), 2 * 1 / (1 + 2)]
    assert score("macro_f1", said, labels) == pytest.approx(sum(per_class) / 3)
    two = np.eye(2)[[1, 1, 0, 0, 1]]
    assert score("f1", two, [1, 0, 1, 0, 1]) == score("f1_a", two, [1, 0, 1, 0, 1]) == pytest.approx(4 / 6)
    # 2 right of class 1, 1 of class 0, one each way wrong: (2·1 - 1·1)/√(3·3·2·2)
    assert score("mcc", two, [1, 0, 1, 0, 1]) == pytest.approx(1 / 6)
    assert score("mcc", np.eye(2)[[1, 1]], [0, 1]) == 0
    line = np.array([[1.0], [2.0], [4.0]])
    assert score("pearson", line, [1, 2, 3]) == pytest.approx(np.corrcoef([1, 2, 4], [1, 2, 3])[0, 1])
    assert score("pearson", np.ones((3, 1)), [1, 2, 3]) == 0
    assert score("acc", np.full((2, 2), np.nan), [0, 1]) == 0.5, "a broken model says class 0"


# -- errors ------------------------------------------------------------------------------------------------------------


def test_errors_name_what_is_wrong(encoder: Path, benchmarks: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="longer than the model's positions"):
        evaluate(small(glue, sets=["rte"], seq_len=64), encoder, benchmarks["glue"])
    with pytest.raises(UserError, match="no such file"):
        evaluate(small(glue, sets=["cola"]), encoder, benchmarks["superglue"])
    with pytest.raises(ValueError, match="different ones"):
        glue.Settings(sets=("wnli",))
    with pytest.raises(ValueError, match="different ones"):
        glue.Settings(seeds=(1, 1))
    assert "encoder" in str(glue.refuses(glue.Settings(), "llama"))
    assert glue.refuses(glue.Settings(), "bert") is None


# -- repeated, killed, with faults -------------------------------------------------------------------------------------


def test_under_faults_it_is_trained_and_scored_with_them(encoder: Path, benchmarks: dict[str, Path]) -> None:
    flips = [{"type": "bitflip", "weight": {"p": 0.01, "zero_out": 1.25}, "input": {"p": 0.0, "zero_out": None}}]
    task = small(glue, sets=["sst2"], seeds=[0])
    ask = partial(evaluate, task, encoder, benchmarks["glue"], transform=flips, fault_seeds=[0, 1])
    one, again = ask(), ask()
    assert one == again
    assert one["metrics"]["average"]["n"] == 2, "one value a fault seed"


PROCESS = """
import json, sys
from pathlib import Path
from pipeline_lib.evaluation import finetuning
from tests.evaluation.test_finetuning import evaluate
task, encoder, asset, work, kill = json.loads(sys.argv[1])
real, done = finetuning.fine_tune, []
def fine_tune(*arguments):
    if kill and len(done) == kill:
        import os, signal
        os.kill(os.getpid(), signal.SIGKILL)
    done.append(arguments[2])
    return real(*arguments)
finetuning.fine_tune = fine_tune
result = evaluate(task, Path(encoder), Path(asset), Path(work))
print(json.dumps([done, result["metrics"]]))
"""


def test_a_kill_costs_one_data_set_at_one_seed(encoder: Path, benchmarks: dict[str, Path], tmp_path: Path) -> None:
    task = small(superglue, sets=["cb", "copa"])
    whole = evaluate(task, encoder, benchmarks["superglue"])

    def attempt(kill: int) -> subprocess.CompletedProcess[str]:
        given = json.dumps([task, str(encoder), str(benchmarks["superglue"]), str(tmp_path), kill])
        command = [sys.executable, "-c", PROCESS, given]
        return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})

    assert attempt(2).returncode == -signal.SIGKILL
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clean.cb-0.json", "clean.copa-0.json"]
    write_bytes(tmp_path / "clean.copa-0.json", b"torn")
    done = attempt(0)
    assert done.returncode == 0, done.stderr
    names, metrics = json.loads(done.stdout)
    assert names == ["copa", "cb", "copa"], "the whole one is kept, the damaged one made again"
    assert metrics == json.loads(json.dumps(whole["metrics"]))
