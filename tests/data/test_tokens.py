"""Token shards, the order of sequences, and the loader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from pipeline_lib.artifacts.files import write_json
from pipeline_lib.artifacts.job import Job
from pipeline_lib.config.errors import UserError
from pipeline_lib.data import pack, parquet
from pipeline_lib.data import tokenizer as tokenizers
from pipeline_lib.data.tokens import BatchLoader, SequenceOrder, TokenShards
from tests.data.jobs import digests, result, run, sentences


@pytest.fixture(scope="module")
def tokens(dataset: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack, "SHARD_TOKENS", 5000)
        return run(
            "tokens", tmp_path_factory.mktemp("tokens"), {"max_tokens": None}, dataset=dataset, tokenizer=trained
        )


def documents(dataset: Path, split: str) -> list[str]:
    return [t for path in sorted(dataset.glob(f"{split}-*")) for t in pq.read_table(path)["text"].to_pylist()]


def test_round_trip(dataset: Path, trained: Path, tokens: Path) -> None:
    tokenizer, info = tokenizers.load(trained)
    made = result(tokens / "tokens.json")
    assert len(made["shards"]["train"]) > 2
    assert made["dtype"] == "uint16"
    for split in ("train", "valid", "test"):
        shards, expected = TokenShards(tokens, split), documents(dataset, split)
        assert made["documents"][split] == len(expected) == len(shards.document_starts)
        assert made["tokens"][split] == shards.n_tokens
        bounds = [*shards.document_starts, shards.n_tokens]
        for text, start, end in zip(expected, bounds, bounds[1:], strict=False):
            document = shards.read(int(start), int(end - start))
            assert (document[0], document[-1]) == (info["bos"], info["eos"])
            assert tokenizer.decode(document[1:-1].tolist(), skip_special_tokens=False) == text


def test_other_readers_can_read_the_shards(tokens: Path) -> None:
    shards = TokenShards(tokens, "train")
    files = [load_file(path) for path in sorted(tokens.glob("train-*.safetensors"))]
    assert (np.concatenate([file["tokens"] for file in files]) == shards.read(0, shards.n_tokens)).all()
    assert files[0]["tokens"].dtype == np.uint16
    assert files[0]["document_starts"].dtype == np.int64
    assert [int(file["document_starts"][0]) for file in files] == [0] * len(files), "a shard begins with a document"


def test_threads_and_shard_sizes_change_no_token(
    dataset: Path,
    trained: Path,
    tokens: Path,
    tmp_path: Path,
) -> None:
    job = Job("tokens", "l", "0" * 64, {"max_tokens": None}, {"dataset": dataset, "tokenizer": trained},
              tmp_path / "work", tmp_path / "work/out", {"threads": 1})  # fmt: skip
    job.out.mkdir(parents=True)
    pack.build(job)
    one, many = TokenShards(job.out, "train"), TokenShards(tokens, "train")
    assert (one.read(0, one.n_tokens) == many.read(0, many.n_tokens)).all()
    assert (one.document_starts == many.document_starts).all()


def test_max_tokens_ends_with_a_whole_document(dataset: Path, trained: Path, tokens: Path, tmp_path: Path) -> None:
    out = run("tokens", tmp_path, {"max_tokens": 3000}, dataset=dataset, tokenizer=trained)
    short, whole = TokenShards(out, "train"), TokenShards(tokens, "train")
    ends = np.append(whole.document_starts[1:], whole.n_tokens)
    assert short.n_tokens == ends[np.searchsorted(ends, 3000)]
    assert (short.read(0, short.n_tokens) == whole.read(0, short.n_tokens)).all()
    assert TokenShards(out, "valid").n_tokens == TokenShards(tokens, "valid").n_tokens


def test_special_names_in_a_text_are_text(trained: Path, tmp_path: Path) -> None:
    texts = ["a <|eos|> b", "<|bos|><|pad|>"]
    pq.write_table(pa.table({"id": ["0", "1"], "text": texts}), tmp_path / "train-00000.parquet")
    write_json(tmp_path / "dataset.json", {"result": {"bytes": {"train": 30, "valid": 0, "test": 0}}})
    out = run("tokens", tmp_path / "job", {"max_tokens": None}, dataset=tmp_path, tokenizer=trained)
    shards = TokenShards(out, "train")
    stream = shards.read(0, shards.n_tokens)
    assert [int((stream == token).sum()) for token in (shards.bos, shards.eos, shards.pad)] == [2, 2, 0]
    assert len(shards.document_starts) == 2


def test_large_vocabularies_get_four_bytes(trained: Path, tmp_path: Path) -> None:
    _, info = tokenizers.load(trained)
    stream = np.array([info["bos"], 70_000, info["eos"]], np.uint32)
    pack._save({"tokens": stream, "document_starts": np.array([0])}, tmp_path / "train-00000.safetensors")
    shard = {"file": "train-00000.safetensors", "tokens": 3, "documents": 1, "sha256": ""}
    write_json(tmp_path / "tokens.json", {"result": {**info, "vocab_size": 80_000, "shards": {"train": [shard]}}})
    assert TokenShards(tmp_path, "train").read(0, 3).tolist() == [info["bos"], 70_000, info["eos"]]


@pytest.mark.parametrize("damage", ["truncate", "extend", "missing", "header"])
def test_damaged_shards_are_refused(tokens: Path, tmp_path: Path, damage: str) -> None:
    for path in tokens.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    victim = tmp_path / "train-00001.safetensors"
    data = victim.read_bytes()
    if damage == "missing":
        victim.unlink()
    else:
        victim.write_bytes({"truncate": data[:-2], "extend": data + b"0", "header": b"\xff" * 9 + data}[damage])
    with pytest.raises(UserError, match=r"train-00001.safetensors: the token shard is damaged"):
        TokenShards(tmp_path, "train")


def test_row_groups_do_not_depend_on_how_rows_came(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "ROW_GROUP_BYTES", 1000)
    table = pa.table({"id": [str(i) for i in range(300)], "text": sentences(300)})
    made = []
    for step in (1, 7, 300):
        writer = parquet.GroupedWriter(tmp_path / f"{step}.parquet")
        for start in range(0, 300, step):
            writer.add(table.slice(start, step))
        assert writer.close()
        made.append((tmp_path / f"{step}.parquet").read_bytes())
    assert made[0] == made[1] == made[2]
    assert pq.read_metadata(tmp_path / "1.parquet").num_row_groups > 10


@given(st.integers(1, 3000), st.integers(0, 2**31 - 1), st.integers(0, 5))
def test_order_is_a_permutation_of_every_epoch(n: int, seed: int, epoch: int) -> None:
    order = SequenceOrder(n, seed)
    found = order.indices(np.arange(epoch * n, (epoch + 1) * n))
    assert sorted(found.tolist()) == list(range(n))
    assert order.index(epoch * n + n // 2) == found[n // 2]


def test_order_is_spread_out_and_differs_by_epoch_and_seed() -> None:
    n = 10_000
    first, second, other = (
        SequenceOrder(n, seed).indices(np.arange(n) + shift) for seed, shift in ((0, 0), (0, n), (1, 0))
    )
    for a, b in ((first, second), (first, other), (first, np.arange(n))):
        assert (a == b).sum() < 10, "about one match is expected"
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(n)
    # Steps between neighbours: 16 equal classes, chi-square with 15 degrees of freedom, p ≈ 1e-5 at 52.
    counts = np.bincount(np.diff(first) % n * 16 // n, minlength=16)
    assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 52


def test_order_needs_no_memory_for_many_sequences() -> None:
    order = SequenceOrder(10_000_000, 5)
    found = order.indices(np.arange(0, 10_000_000, 10_007))
    assert len(set(found.tolist())) == len(found)
    assert 0 <= found.min() < 10**5 < 9_900_000 < found.max() < 10_000_000


@pytest.fixture
def loader(tokens: Path) -> BatchLoader:
    return BatchLoader(TokenShards(tokens, "train"), seq_len=32, global_batch=8, seed=3)


def test_sequences_cover_the_stream_once(loader: BatchLoader) -> None:
    stream = loader.shards.read(0, loader.shards.n_tokens).astype(np.int64)
    labels = np.concatenate([loader.sequence(k)[1:] for k in range(loader.n_sequences)])
    assert (labels == stream[1 : len(labels) + 1]).all()
    assert len(stream) - 1 - len(labels) < loader.seq_len
    crossing = int(loader.shards._starts[1]) // 32  # the window that lies in two shards
    assert (loader.sequence(crossing) == stream[crossing * 32 : crossing * 32 + 33]).all()


@pytest.mark.parametrize(("ranks", "micro_batch"), [(1, 8), (2, 4), (2, 2), (1, 2), (4, 1), (8, 1)])
def test_ranks_and_accumulation_change_no_data(loader: BatchLoader, ranks: int, micro_batch: int) -> None:
    for step in (0, 1, loader.n_sequences // 8, 3 * loader.n_sequences // 8):  # also across epochs
        whole: tuple[torch.Tensor, torch.Tensor] = loader.batch(step, 0, 8)
        rows: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for a in range(8 // (ranks * micro_batch)):
            for rank in range(ranks):
                first = a * ranks * micro_batch + rank * micro_batch
                inputs, labels = loader.batch(step, first, micro_batch)
                rows.update({first + i: (inputs[i], labels[i]) for i in range(micro_batch)})
        assert sorted(rows) == list(range(8))
        for i, (inputs, labels) in rows.items():
            assert torch.equal(inputs, whole[0][i])
            assert torch.equal(labels, whole[1][i])


def test_batches(loader: BatchLoader) -> None:
    inputs, labels = loader.batch(0, 0, 8)
    assert inputs.shape == labels.shape == (8, 32)
    assert inputs.dtype == labels.dtype == torch.int64
    assert torch.equal(inputs[:, 1:], labels[:, :-1])
    again = BatchLoader(loader.shards, 32, 8, seed=3)
    assert torch.equal(again.batch(7, 0, 8)[0], loader.batch(7, 0, 8)[0]), "the position is the step"
    other = BatchLoader(loader.shards, 32, 8, seed=4)
    assert not torch.equal(other.batch(0, 0, 8)[0], inputs)
    steps = loader.n_sequences // 8
    seen = np.concatenate([loader.sequences(step, 0, 8) for step in range(steps)])
    assert len(set(seen.tolist())) == len(seen)
    with pytest.raises(IndexError):
        loader.batch(0, 4, 5)


def test_documents_of_a_batch(loader: BatchLoader) -> None:
    inputs, numbers = loader.batch(2, 0, 8)[0], loader.documents(2, 0, 8)
    begins = inputs[:, 1:] == loader.shards.bos
    assert begins.any()
    assert torch.equal(numbers[:, 1:] - numbers[:, :-1], begins.long())


def test_too_little_data_is_said(tokens: Path) -> None:
    with pytest.raises(UserError, match="the valid split has"):
        BatchLoader(TokenShards(tokens, "valid"), seq_len=10**6, global_batch=1, seed=0)


def test_work_that_is_damaged_is_made_again(
    dataset: Path,
    trained: Path,
    tokens: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pack, "SHARD_TOKENS", 5000)
    settings: dict[str, Any] = {"max_tokens": None}
    run("tokens", tmp_path, settings, dataset=dataset, tokenizer=trained)
    victim = tmp_path / "work/shards/train-00001.safetensors"
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    assert digests(run("tokens", tmp_path, settings, dataset=dataset, tokenizer=trained)) == digests(tokens)
