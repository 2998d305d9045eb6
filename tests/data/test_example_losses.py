"""Losses of sequences: the format, and published pickles, which may do nothing and must belong to the data."""

from __future__ import annotations

import hashlib
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline_lib import __main__ as command
from pipeline_lib.artifacts.files import read_json, write_json
from pipeline_lib.config.errors import UserError
from pipeline_lib.data.example_losses import ExampleLosses, check_same, sequence_count, sequences_digest
from pipeline_lib.data.published_losses import prepared_digest, read_pickles
from pipeline_lib.data.tokens import TokenShards
from tests.training_bench import make_tokens

SEQ_LEN = 16
COUNT = (1200 - 1) // SEQ_LEN


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokens(tmp_path_factory.mktemp("tokens"))


def values(count: int) -> dict[int, float]:
    return {number: 0.5 + number / 100 for number in range(count)}


def write(folder: Path, *chunks: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, chunk in enumerate(chunks):
        (folder / f"dict_chunk_{number}.pkl").write_bytes(chunk if isinstance(chunk, bytes) else pickle.dumps(chunk))
    return folder


def imported(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """(exit code, message) of the command."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["errata", "import-losses", *map(str, arguments)])
        code = command.main()
    return code, capsys.readouterr().err


def test_the_digest_is_of_the_sequences_alone(tokens: Path) -> None:
    shards = TokenShards(tokens, "train")
    assert sequence_count(shards, SEQ_LEN) == COUNT == 74
    ids = shards.read(0, COUNT * SEQ_LEN).astype("<u4").tobytes()
    assert sequences_digest(shards, SEQ_LEN) == hashlib.sha256(b"16:" + ids).hexdigest()
    assert sequences_digest(shards, 32) != sequences_digest(shards, SEQ_LEN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline_lib.data.example_losses.HASHED_AT_A_TIME", 48)
        assert sequences_digest(shards, SEQ_LEN) == hashlib.sha256(b"16:" + ids).hexdigest()


def test_the_format_keeps_losses_and_says_what_they_are(tokens: Path, tmp_path: Path) -> None:
    shards = TokenShards(tokens, "train")
    loss_N = np.linspace(1, 2, COUNT, dtype=np.float32)
    loss_N[3] = np.nan
    ExampleLosses(loss_N, SEQ_LEN, sequences_digest(shards, SEQ_LEN), None).save(tmp_path)
    found = ExampleLosses.load(tmp_path)
    assert np.array_equal(found.loss_N, loss_N, equal_nan=True)
    check_same(found, shards, "here")
    result = read_json(tmp_path / "score.json")["result"]
    assert (result["sequences"], result["without_targets"]) == (COUNT, 1)
    assert result["mean"] == pytest.approx(np.nanmean(loss_N.astype(np.float64)))
    with pytest.raises(UserError, match="other sequences than those that are trained on"):
        check_same(found, TokenShards(tokens, "valid"), "here")
    write_json(tmp_path / "score.json", {"result": {**result, "sequences": 5}})
    with pytest.raises(UserError, match="do not agree"):
        ExampleLosses.load(tmp_path)
    (tmp_path / "losses.safetensors").unlink()
    with pytest.raises(UserError, match="no losses of sequences"):
        ExampleLosses.load(tmp_path)


def test_pickles_of_matching_data_are_imported(
    tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    every = values(COUNT)
    folder = write(tmp_path / "pickles", {n: every[n] for n in range(40, 74)}, {n: every[n] for n in range(40)})
    digest = sequences_digest(TokenShards(tokens, "train"), SEQ_LEN)
    given = (folder, tokens, "--seq-len", SEQ_LEN, "--out", tmp_path / "out")
    code, message = imported(capsys, *given, "--digest", digest)
    assert code == 0, message
    found = ExampleLosses.load(tmp_path / "out")
    assert found.loss_N.tolist() == pytest.approx(list(every.values()), rel=1e-6), "by number, not by file"
    assert found.masks == {"seed": None, "rate": None}, "nobody knows with which masks these were measured"
    check_same(found, TokenShards(tokens, "train"), "here")


def test_pickles_of_other_data_are_refused(tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "pickles", values(COUNT))
    digest = sequences_digest(TokenShards(tokens, "train"), SEQ_LEN)
    out = tmp_path / "out"
    for folder_, seq_len, mark in (
        (folder, SEQ_LEN, "0" * 64),  # of another dataset
        (folder, 8, digest),  # cut in another way
        (write(tmp_path / "few", values(COUNT - 1)), SEQ_LEN, digest),  # of another split
    ):
        code, message = imported(capsys, folder_, tokens, "--seq-len", seq_len, "--out", out, "--digest", mark)
        assert code == 2
        assert "measured on other sequences than these tokens hold" in message
        assert not out.exists()
    with pytest.raises(SystemExit):  # a digest there must be
        imported(capsys, folder, tokens, "--out", out)
    capsys.readouterr()
    code, message = imported(capsys, folder, tmp_path, "--out", out, "--digest", digest)
    assert code == 2
    assert "no tokens" in message


def test_the_prepared_dataset_proves_it(tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All sequences of the stream, the last one too, which training leaves out for want of a next token."""
    import datasets

    shards = TokenShards(tokens, "train")  # as docs/efficient-training.md tells users to
    rows = shards.read(0, shards.n_tokens // SEQ_LEN * SEQ_LEN).reshape(-1, SEQ_LEN)
    prepared = datasets.Dataset.from_dict({"input_ids": rows.astype("int64")})
    assert len(prepared) == 75
    prepared.save_to_disk(str(tmp_path / "prepared"))
    folder, out = write(tmp_path / "pickles", values(75)), tmp_path / "out"
    given = (folder, tokens, "--seq-len", SEQ_LEN, "--out", out, "--dataset")
    code, message = imported(capsys, *given, tmp_path / "prepared")
    assert code == 0, message
    assert len(ExampleLosses.load(out).loss_N) == COUNT
    check_same(ExampleLosses.load(out), TokenShards(tokens, "train"), "here")

    code, message = imported(capsys, *given, tmp_path / "prepared", "--holdout", 0.2)
    assert code == 2
    assert "another number of sequences" in message
    kept = prepared.train_test_split(test_size=0.2, seed=0)["train"]  # as published: what the model did not see
    kept.save_to_disk(str(tmp_path / "kept"))
    assert prepared_digest(tmp_path / "prepared", SEQ_LEN, 0.2) == prepared_digest(tmp_path / "kept", SEQ_LEN, None)
    assert len(kept) == 60
    code, message = imported(
        capsys, write(tmp_path / "part", values(60)), *given[1:], tmp_path / "prepared", "--holdout", 0.2
    )
    assert code == 2, "a part of the sequences, and shuffled: not these tokens"
    assert "measured on other sequences" in message
    code, message = imported(capsys, *given, tmp_path / "pickles")
    assert code == 2
    assert "no prepared dataset" in message


class Evil:
    """What a pickle can do to whoever loads it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_pickle_can_do_nothing(tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    evil = pickle.dumps({0: Evil(touched)})
    assert pickle.loads(evil) == {0: None}
    assert touched.exists(), "it would have"
    touched.unlink()
    by_hand = b"cos\nsystem\n(S'touch " + str(touched).encode() + b"'\ntR."  # protocol 0
    for number, data in enumerate((evil, by_hand, pickle.dumps({0: np.float32(1)}), pickle.dumps({0: Path})[:-1])):
        with pytest.raises(UserError, match="the pickle is not read"):
            read_pickles(write(tmp_path / str(number), data))
    assert not touched.exists()


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        ((), "not all there"),
        (([1.0, 2.0],), "not a dict of losses"),
        (({},), "not a dict of losses"),
        (({0: 1},), "whole numbers from 0 on, and finite floats"),
        (({True: 1.0},), "whole numbers from 0 on"),
        (({-1: 1.0},), "whole numbers from 0 on"),
        (({0: float("nan")},), "finite floats"),
        (({0: 1.0, 2: 1.0},), "missing, or there twice"),
        (({0: 1.0}, {0: 1.0}), "missing, or there twice"),
    ],
)
def test_what_is_no_loss_is_refused(tmp_path: Path, chunks: tuple[Any, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_pickles(write(tmp_path, *chunks))


def test_a_missing_chunk_is_seen(tmp_path: Path) -> None:
    write(tmp_path, {0: 1.0}, {1: 1.0}, {2: 1.0})
    (tmp_path / "dict_chunk_1.pkl").unlink()
    with pytest.raises(UserError, match="not all there"):
        read_pickles(tmp_path)
