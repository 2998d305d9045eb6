"""An evaluation under a transform that packs weights: it runs on packed tensors, and leaves the checkpoint alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline_lib.evaluation.run import Session, _Transformed
from pipeline_lib.transforms import packed

INT2 = [{"type": "int2", "group_size": 8}]


def test_it_says_what_latent_weights_say(
    settings: dict[str, Any], checkpoint: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, inputs = Session(), {"checkpoint": checkpoint, "dataset": dataset}

    def perplexity(transform: list[dict[str, Any]]) -> float:
        own = {**settings, "transform": transform, "fault_seeds": [0] if transform else []}
        return session.evaluate(own, inputs, None, {}).result["metrics"]["word_perplexity"]["mean"]

    clean = perplexity([])
    quantised = perplexity(INT2)
    assert quantised != clean
    assert perplexity([]) == clean
    monkeypatch.setattr(packed, "pack_for", lambda *_: None)
    monkeypatch.setattr(packed, "drop_latent", lambda *_: None)
    assert perplexity(INT2) == pytest.approx(quantised, rel=1e-4)


def test_its_model_holds_packed_weights_only(settings: dict[str, Any], checkpoint: Path) -> None:
    loaded = Session()._load(checkpoint, "float32", {})
    before = sum(p.numel() for p in loaded.model.parameters())
    with loaded.under(INT2) as model:
        assert isinstance(model, _Transformed)
        layers = [p for name, p in model.module.named_parameters() if "_proj" in name]
        assert sum(p.numel() for p in layers) == 0
        assert any(name.endswith("store.codes") for name, _ in model.module.named_buffers())
    assert sum(p.numel() for p in loaded.model.parameters()) == before
