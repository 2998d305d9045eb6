"""The holdout: training documents kept apart for a model whose losses choose what others learn."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline_lib.config.errors import UserError
from pipeline_lib.config.schema import Split
from pipeline_lib.data import splits
from pipeline_lib.data.tokens import TokenShards
from tests.data.jobs import dataset_settings, digests, result, run, sentences


def ids(dataset: Path, split: str) -> set[str]:
    return {i for path in dataset.glob(f"{split}-*") for i in pq.read_table(path)["id"].to_pylist()}


def test_it_takes_from_training_alone() -> None:
    hashes = splits.hashes([f"document {i}" for i in range(20_000)], seed=0)
    given: dict[str, float | int] = {"valid": 0.1, "test": 0.05}
    without, bounds = splits.shares(given), splits.shares({**given, "holdout": 0.2})
    assert without is not None
    assert bounds is not None
    before, after = without.assign(hashes), bounds.assign(hashes)
    moved = before != after
    assert (before[moved] == 0).all()
    assert (after[moved] == 3).all()
    assert abs(moved.mean() - 0.2) < 4 * np.sqrt(0.2 * 0.8 / len(hashes))
    counted = splits.counted({"valid": 30, "test": 0.05, "holdout": 0.2}, [hashes], "d").assign(hashes)
    assert (np.bincount(counted)[1], round(np.bincount(counted)[3] / len(hashes), 1)) == (30, 0.2)


def test_a_dataset_without_one_is_what_it_was() -> None:
    assert Split().semantic() == {"valid": 0.01, "test": 0.01}
    assert splits.names(Split().semantic()) == ("train", "valid", "test")
    assert splits.names(Split(holdout=0.2).semantic()) == ("train", "valid", "test", "holdout")


@pytest.fixture(scope="module")
def made(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A dataset and its tokens, with a holdout and without."""
    root, found = tmp_path_factory.mktemp("holdout"), {}
    lines = [json.dumps({"id": str(n), "text": text}) for n, text in enumerate(sentences(120))]
    (root / "text.jsonl").write_text("\n".join(lines))
    for name, more in (("without", {}), ("with", {"holdout": 0.3})):
        settings = dataset_settings({"type": "local", "path": str(root / "text.jsonl")})
        settings["split"] = {**settings["split"], **more}
        found[name] = run("dataset", root / name / "dataset", settings)
        inputs = {"dataset": found[name], "tokenizer": trained}
        found[f"tokens {name}"] = run("tokens", root / name / "tokens", {"max_tokens": None}, **inputs)
    return found


def test_the_stages_keep_it_apart(made: dict[str, Path]) -> None:
    kept, before = ids(made["with"], "holdout"), ids(made["without"], "train")
    assert 0.15 < len(kept) / 120 < 0.45
    assert kept | ids(made["with"], "train") == before
    assert not kept & ids(made["with"], "train")
    for split in ("valid", "test"):
        assert ids(made["with"], split) == ids(made["without"], split)
        files = {f"{split}-00000.parquet", f"{split}-00000.safetensors"}
        for kind in ("", "tokens "):
            one, other = digests(made[f"{kind}with"]), digests(made[f"{kind}without"])
            assert {n: d for n, d in one.items() if n in files} == {n: d for n, d in other.items() if n in files}
    assert set(result(made["without"] / "dataset.json")["documents"]) == {"train", "valid", "test"}
    assert result(made["with"] / "dataset.json")["documents"]["holdout"] == len(kept)
    assert TokenShards(made["tokens with"], "holdout").n_tokens > 0


def test_asking_for_one_that_is_not_there(made: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=r"no such split(.|\n)*`split` a `holdout`"):
        TokenShards(made["tokens without"], "holdout")
