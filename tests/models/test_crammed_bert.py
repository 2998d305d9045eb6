"""The crammed BERT: its published size and settings, its masked decoder, its way to disk and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline_lib.config.models import Bert, count_parameters
from pipeline_lib.models import bert
from pipeline_lib.models.checkpoint import load_model
from pipeline_lib.models.crammed_bert import sinusoids
from pipeline_lib.transforms.apply import apply
from tests.training.cram_bench import CRAMMED

PUBLISHED = {"family": "bert", "dim": 768, "layers": 16, "heads": 12, "ffn": 3072, "crammed": True, "norm_eps": 1e-12}
PUBLISHED |= {"vocab": 32768, "max_seq_len": 128}
TOKENS_BT = torch.arange(48).view(3, 16) % 64


@pytest.fixture
def small() -> Any:
    torch.manual_seed(0)
    return bert.build(CRAMMED).eval()


def test_it_has_the_published_size() -> None:
    with torch.device("meta"):
        built: Any = bert.build(PUBLISHED)
    assert sum(parameter.numel() for parameter in built.parameters()) == 120_179_713
    assert count_parameters(PUBLISHED) == (120_179_713, 120_179_713 - 32768 * 768)
    assert built.decoder.weight is built.bert.embeddings.word_embeddings.weight, "tied"
    layer = built.bert.layers[0]
    assert layer.mlp.in_proj.weight.shape == (3072, 768)
    assert layer.mlp.out_proj.weight.shape == (768, 1536), "half is gate"
    assert layer.norm1.eps == 1e-12
    biases = [name for name, _ in built.named_parameters() if "bias" in name]
    assert len(biases) == 34, "those of norms alone"
    assert all("norm" in name for name in biases)


def test_an_odd_gate_is_refused() -> None:
    with pytest.raises(ValueError, match="half value and half gate"):
        Bert(dim=8, layers=1, heads=2, ffn=9, crammed=True)
    assert "crammed" not in Bert(dim=8, layers=1, heads=2, ffn=9).semantic(), "fingerprints of others stand"


def test_initial_weights(small: Any) -> None:
    for name, parameter in small.named_parameters():
        if name.endswith("position_scale"):
            assert parameter.item() == pytest.approx(32**-0.5)
        elif "norm" in name:
            assert torch.equal(parameter, torch.full_like(parameter, float(name.endswith("weight")))), name
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name


def test_positions_are_sinusoids() -> None:
    table_TD = sinusoids(3, 4, torch.device("cpu"))
    expected = [[0, 1, 0, 1], [0.841471, 0.540302, 0.0099998, 0.99995], [0.909297, -0.416147, 0.0199987, 0.9998]]
    assert torch.allclose(table_TD, torch.tensor(expected), atol=1e-5)


def test_logits_of_masked_tokens_alone(small: Any) -> None:
    at_BT = torch.zeros_like(TOKENS_BT).bool()
    at_BT[0, 3] = at_BT[2, 1] = at_BT[2, 15] = True
    with torch.no_grad():
        whole, part = small(TOKENS_BT).logits, small(TOKENS_BT, at=at_BT).logits
    assert part.shape == (3, 64)
    assert torch.allclose(whole[at_BT], part, atol=1e-6)


def test_padding_is_not_attended_to(small: Any) -> None:
    """The published attention takes no mask, so that fine-tuning reads its padding."""
    mask_BT = torch.ones_like(TOKENS_BT)
    mask_BT[:, 10:] = 0
    other_BT = TOKENS_BT.clone()
    other_BT[:, 10:] = 5
    with torch.no_grad():
        assert torch.equal(small(TOKENS_BT, mask_BT).logits[:, :10], small(other_BT, mask_BT).logits[:, :10])
        assert not torch.equal(small(TOKENS_BT).logits[:, :10], small(other_BT).logits[:, :10])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_it_is_saved_and_loaded(small: Any, tmp_path: Path, attention: str) -> None:
    small.save_pretrained(tmp_path)
    loaded: Any = load_model(tmp_path)
    loaded.set_attn_implementation(attention)
    with torch.no_grad():
        assert torch.allclose(loaded(TOKENS_BT).logits, small(TOKENS_BT).logits, atol=1e-6)
    assert loaded.decoder.weight is loaded.bert.embeddings.word_embeddings.weight


def test_transforms_find_its_sites(small: Any) -> None:
    flips = [{"type": "bitflip", "weight": {"p_frac": 0.01}, "input": {"p_frac": 0.01}}]
    with torch.no_grad():
        clean = small(TOKENS_BT).logits
        applied = apply(small, flips, seed=0)
        applied.context.begin(0, 0)
        assert applied.report["histogram"] == {"0:bitflip:*.layer*.*": {"linear": 24}}
        assert not torch.equal(small(TOKENS_BT).logits, clean)
    from pipeline_lib.transforms.sites import find_sites

    kinds = {found.site.name for found in find_sites(small) if found.site.kind == "product"}
    assert len(kinds) == 8, "two products in each of four layers"
