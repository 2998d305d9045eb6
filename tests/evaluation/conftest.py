"""A tiny checkpoint and a tiny dataset, made once for all tests of evaluation."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from pipeline_lib.config.registry import TRANSFORMS

TEXT = "the a of model fault bit flips weight energy memory reads writes tensor layer noise sum row key value"
WORDS = TEXT.split()
JITTER = [{"type": "jitter", "amount": 0.3, "roles": ["input", "weight"]}]


def documents(count: int, seed: int) -> list[str]:
    import random

    rng = random.Random(seed)
    return [" ".join(rng.choice(WORDS) for _ in range(rng.randint(5, 90))) + ".\n" for _ in range(count)]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of about 20 k parameters with its own tokenizer, untrained."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from pipeline_lib.models import llama
    from pipeline_lib.models.checkpoint import save_checkpoint

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|begin|>", "<|end|>", "<|pad|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        documents(50, 1), trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=special[0], eos_token=special[1], pad_token=special[2]
    )
    settings = {"family": "llama", "dim": 16, "layers": 2, "heads": 2, "kv_heads": 1, "ffn": 32, "vocab": 300}
    torch.manual_seed(0)
    model = llama.build({**settings, "max_seq_len": 32})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(12)  # an untrained model is so flat that faults hardly show
    folder = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(folder, model.config, model.state_dict(), tokenizer, "LlamaForCausalLM")
    return folder


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder like an artifact of the dataset stage."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path_factory.mktemp("dataset")
    for split, count in (("train", 3), ("test", 9)):
        texts = documents(count, 2)
        table = pa.table({"id": [f"{split}-{i}" for i in range(count)], "text": texts})
        pq.write_table(table, folder / f"{split}-00000.parquet")
    return folder


@pytest.fixture
def settings() -> dict[str, Any]:
    """Settings of the stage `evaluate`: a clean arm."""
    return {
        "task": {"type": "lm_eval", "task": "pydocs", "dataset": "pydocs"},
        "transform": [],
        "fault_seeds": [],
        "seed": 0,
        "dtype": "float32",
    }


@pytest.fixture(autouse=True)
def jitter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' own transform, for as long as a test runs."""
    monkeypatch.setitem(TRANSFORMS._extra, "jitter", "tests.evaluation.jitter")


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Sockets that reach nothing but loopback and the machine itself; gives what was tried."""
    tried: list[Any] = []
    real = socket.socket.connect

    def connect(self: socket.socket, address: Any) -> None:
        outside = self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost")
        if outside:
            tried.append(address)
            raise OSError(f"a test blocks the network: {address}")
        real(self, address)

    def getaddrinfo(host: Any, *_: Any, **__: Any) -> Any:
        tried.append(host)
        raise OSError(f"a test blocks name look-up: {host}")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return tried
