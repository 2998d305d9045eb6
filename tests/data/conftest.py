"""A loopback hub that the real client talks to, no waiting between tries, a small dataset and its tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.data.files import settings, write
from tests.data.jobs import dataset_settings, run, sentences
from tests.hub import FakeHub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub, with the environment set so that the client finds it, and without a token."""
    with FakeHub() as server:
        for name, value in server.env().items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield server


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that tries waited for each other; nothing really waits."""
    asked: list[float] = []
    monkeypatch.setattr("pipeline_lib.data.retry.time.sleep", asked.append)
    return asked


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("dataset")
    files = [str(write(root / f"{i}.jsonl", sentences(150, i))) for i in range(3)]
    return run("dataset", root / "job", dataset_settings(settings(files)))


@pytest.fixture(scope="module")
def trained(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run("tokenizer", tmp_path_factory.mktemp("bpe"), {"train": {"vocab_size": 400}}, dataset=dataset)
