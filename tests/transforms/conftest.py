"""Toy transforms, registered for one test at a time, and tokens."""

from __future__ import annotations

import pytest
import torch
from transform_toys.models import LENGTH, VOCAB

from pipeline_lib.config.registry import TRANSFORMS

TOYS = ("store", "fault", "compute")


@pytest.fixture(autouse=True)
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register toy_store, toy_fault and toy_compute."""
    monkeypatch.setattr(TRANSFORMS, "_extra", dict(TRANSFORMS._extra))
    for name in TOYS:
        TRANSFORMS.register(f"toy_{name}", f"transform_toys.{name}")


@pytest.fixture
def tokens() -> torch.Tensor:
    """8 sequences of token ids, [8, LENGTH]."""
    return torch.randint(1, VOCAB, (8, LENGTH), generator=torch.Generator().manual_seed(1))
