"""The whole DAG from download to CSV, through Snakemake: the real hub client against a hub on loopback."""

from __future__ import annotations

import copy
import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.evaluation.conftest import checkpoint, documents  # noqa: F401  (a fixture)
from tests.evaluation.test_lm_eval import README, WIKITEXT
from tests.hub import FakeHub
from tests.workflow.clone import TINY, Clone

pytestmark = pytest.mark.slow

STORIES, TOKENIZER, MODEL = "tests/stories", "tests/tokenizer", "tests/tiny-llama"
RESULTS = ("results/bitflip-tiny/wikitext.json", "results/bitflip-hubllama/wikitext.json")
TARGETS = (*RESULTS, "results/sweeps/p.csv")
FLIPS = {"weight": {"p": 0.01, "zero_out": 8.0}, "input": {"p": 1e-3, "zero_out": 30.0}}
CONFIG: dict[str, Any] = {
    "tokenizers": {"bpe": {"hub": TOKENIZER, "vocab": 300}},
    "datasets": {
        "stories": {"source": {"type": "hub", "repo": STORIES, "split": "train"}, "split": {"valid": 0.2, "test": 0.2}}
    },
    "models": {
        "tiny": {**TINY["models"]["tiny"], "tokenizer": "bpe", "dataset": "stories", "tasks": ["wikitext"]},
        "hubllama": {"hub": {"repo": MODEL}, "tasks": ["wikitext"]},
    },
    "transforms": {"plain": {}, "bitflip": FLIPS},
    "tasks": {
        "wikitext": {
            "type": "lm_eval",
            "task": "wikitext",
            "hub": [{"repo": WIKITEXT, "patterns": ["README.md", "wikitext-2-raw-v1/*"]}],
            "max_length": 16,
            "limit": 2,
        }
    },
    "experiments": {"bitflip-tiny": {}, "bitflip-hubllama": {}},
    "sweeps": {
        "p": {
            "experiment": "bitflip-hubllama",
            "task": "wikitext",
            "grid": {"transform.bitflip.weight.p": [0.0, 0.01], "transform.bitflip.input.p": [0.0, 1e-3]},
        }
    },
    "fault_seeds": 2,
    "tracking": {"wandb": "off"},
}


def parquet(column: str, count: int, seed: int) -> bytes:
    """A Parquet file of one column of text."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(pa.table({column: documents(count, seed)}), buffer)
    return buffer.getvalue()


def stories(seed: int) -> dict[str, bytes]:
    """The files of the dataset."""
    return {f"data/train-0000{n}-of-00002.parquet": parquet("text", 40, seed + n) for n in (0, 1)}


def fill(hub: FakeHub, folder: Path) -> None:
    """Put on the hub what the configuration names, and files beside it that nobody should fetch."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    tokenizer = {name: data for name, data in files.items() if name.startswith(("tokenizer", "special"))}
    hub.add("dataset", STORIES, {"README.md": b"# Stories\n", **stories(1)})
    hub.add("model", TOKENIZER, {**tokenizer, "model.safetensors": b"not wanted"})
    hub.add("model", MODEL, {**files, "pytorch_model.bin": b"a pickle", "flax_model.msgpack": b"not wanted"})
    pages = {
        f"wikitext-2-raw-v1/{split}-00000.parquet": parquet("page", 6, 7) for split in ("train", "validation", "test")
    }
    hub.add(
        "dataset", WIKITEXT, {"README.md": README.encode(), **pages, "wikitext-103-raw-v1/test-00000.parquet": b"no"}
    )


@pytest.fixture(scope="module")
def hub(checkpoint: Path) -> Iterator[FakeHub]:
    """The hub, and an environment that leads the real client there."""
    with FakeHub() as started, pytest.MonkeyPatch.context() as patch:
        fill(started, checkpoint)
        for name, value in started.env().items():
            patch.setenv(name, value)
        yield started


@pytest.fixture(scope="module")
def finished(hub: FakeHub, tmp_path_factory: pytest.TempPathFactory) -> Clone:  # (not the one of conftest.py)
    """Planned, pinned, and all targets made."""
    clone = Clone.make(tmp_path_factory.mktemp("hub-dag") / "clone", CONFIG)
    assert clone.run("plan", *TARGETS).count("main will be pinned at download") == 4
    clone.run("pin")
    assert "will be pinned" not in clone.run("plan", *TARGETS)
    assert hub.downloads("") == [request for request in hub.requests if "/api/" in request.path], (
        "pinning fetches no file"
    )
    clone.snakemake(*TARGETS)
    return clone


@pytest.fixture
def copied(finished: Clone, tmp_path: Path) -> Clone:
    """A copy of the finished clone."""
    clone = Clone.make(tmp_path / "clone", CONFIG)
    clone.copy_results_from(finished)
    clone.copy_snakemake_from(finished)
    (clone.root / "hub.lock.json").write_bytes((finished.root / "hub.lock.json").read_bytes())
    return clone


def artifacts(clone: Clone) -> set[str]:
    """`stage/id` of all that is in the store."""
    return {f"{path.parent.name}/{path.name}" for path in (clone.root / "results" / "store").glob("*/*")}


def result(path: Path) -> Any:
    return json.loads(path.read_text())["result"]


def test_from_download_to_csv(finished: Clone, hub: FakeHub) -> None:
    for target in RESULTS:
        arms = result(finished.root / target)
        for arm in ("clean", "transformed"):
            assert arms[arm]["n_samples"] == 2
            assert arms[arm]["metrics"]["word_perplexity"]["mean"]
        assert arms["transformed"]["fault_seeds"] == [0, 1]
        assert arms["transformed"]["metrics"] != arms["clean"]["metrics"]
    rows = list(csv.DictReader((finished.root / TARGETS[2]).open()))
    assert [(row["transform.bitflip.weight.p"], row["transform.bitflip.input.p"]) for row in rows] == [
        ("0.0", "0.0"), ("0.0", "0.001"), ("0.01", "0.0"), ("0.01", "0.001"),
    ]  # fmt: skip
    figures = [float(row["byte_perplexity"]) for row in rows]
    assert len(set(figures)) == len(rows)
    experiment = result(finished.root / RESULTS[1])["transformed"]["metrics"]["byte_perplexity"]["mean"]
    assert figures[-1] == experiment, "the last point is the experiment itself"


def test_everything_is_what_was_pinned(finished: Clone, hub: FakeHub) -> None:
    lock = json.loads((finished.root / "hub.lock.json").read_text())
    assert lock == {f"{kind}s/{name}@main": commit for (kind, name), commit in hub.branches.items()}
    store = finished.root / "results" / "store"
    fetched = {}
    for path in store.glob("assets/*/asset.json"):
        asset = result(path)
        assert asset["revision"] == lock[f"{asset['repo_type']}s/{asset['repo']}@main"]
        fetched.setdefault(asset["repo"], set()).update(asset["files"])
    assert set(fetched) == {TOKENIZER, MODEL, WIKITEXT}
    assert "model.safetensors" in fetched[MODEL]
    unwanted = ("pytorch_model.bin", "flax_model.msgpack", "wikitext-103-raw-v1/test-00000.parquet")
    assert not any(hub.downloads(name) for name in unwanted)
    assert not any(TOKENIZER in request.path for request in hub.downloads("model.safetensors"))
    [dataset] = store.glob("dataset/*/dataset.json")
    assert sum(result(dataset)["documents"].values()) == 80
    spec = json.loads((dataset.parent / ".manifest.json").read_text())["spec"]
    assert spec["settings"]["source"]["revision"] == hub.branches["dataset", STORIES]


def test_a_rerun_asks_the_hub_nothing(copied: Clone, hub: FakeHub) -> None:
    before = len(hub.requests)
    assert copied.would_run(*TARGETS) == {}
    assert "Nothing to be done" in copied.snakemake(*TARGETS)
    assert len(hub.requests) == before


def test_a_new_revision_of_the_dataset_runs_what_depends_on_it(copied: Clone, hub: FakeHub) -> None:
    old = hub.branches["dataset", STORIES]
    before, other = artifacts(copied), result(copied.root / RESULTS[1])
    first = result(copied.root / RESULTS[0])
    new = hub.add("dataset", STORIES, {"README.md": b"# Stories\n", **stories(5)})
    try:
        assert copied.would_run(*TARGETS) == {}, "the branch moved, the pin did not"
        assert new in copied.run("pin")
        jobs = {"dataset": 1, "tokens": 1, "train": 1, "convert": 1, "evaluate": 2, "result": 1, "experiment_result": 1}
        assert copied.would_run(*TARGETS) == jobs
        assert f"changed: source.revision '{old}' → '{new}'" in copied.run("plan", *TARGETS)
        copied.snakemake(*TARGETS)
    finally:
        hub.branches["dataset", STORIES] = old
    made = sorted(name.split("/")[0] for name in artifacts(copied) - before)
    assert made == ["convert", "dataset", "evaluate", "evaluate", "result", "tokens", "train"]
    assert before <= artifacts(copied), "what was made of the old revision stays"
    assert result(copied.root / RESULTS[0]) != first
    assert result(copied.root / RESULTS[1]) == other

    written = copy.deepcopy(CONFIG)
    written["datasets"]["stories"]["source"]["revision"] = old
    copied.write_config(written)
    assert copied.would_run(*TARGETS) == {"experiment_result": 1}, "the old revision, written out, is in the store"


def test_without_the_hub_nothing_reruns_and_evaluations_run(
    copied: Clone, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FakeHub() as gone:
        pass
    monkeypatch.setenv("HF_ENDPOINT", gone.url)
    asked = len(hub.requests)
    assert "Nothing to be done" in copied.snakemake(*TARGETS)
    edited = copy.deepcopy(CONFIG)
    edited["sweeps"]["p"]["grid"]["transform.bitflip.weight.p"] = [0.0, 0.02]
    edited["tasks"]["wikitext"]["limit"] = 1
    copied.write_config(edited)
    targets = TARGETS[1:]
    jobs = {"evaluate": 2, "result": 1, "experiment_result": 1, "sweep": 1, "sweep_result": 1}
    assert copied.would_run(*targets) == jobs
    copied.snakemake(*targets)
    assert result(copied.root / RESULTS[1])["clean"]["n_samples"] == 1
    rows = list(csv.DictReader((copied.root / TARGETS[2]).open()))
    assert [row["transform.bitflip.weight.p"] for row in rows] == ["0.0", "0.0", "0.02", "0.02"]
    assert len(hub.requests) == asked
