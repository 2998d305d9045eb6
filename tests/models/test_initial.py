"""Initial weights: the published scheme, and no dependence on anything but name and seed."""

from __future__ import annotations

import pytest
import torch

from pipeline_lib.models.initial import initial_weight

DIM = 256


@pytest.mark.parametrize(
    ("name", "std"),
    [
        ("model.embed_tokens.weight", 1.0),
        ("lm_head.weight", DIM**-0.5 * 0.98658),  # a normal cut at 3σ
        ("model.layers.0.self_attn.q_proj.weight", 0.02),
        ("model.layers.12.mlp.gate_proj.weight", 0.02),
        ("model.layers.0.mlp.up_proj.weight", 0.02 / 2**0.5),
        ("model.layers.12.self_attn.o_proj.weight", 0.02 / 26**0.5),
        ("model.layers.12.mlp.down_proj.weight", 0.02 / 26**0.5),
    ],
)
def test_spread(name: str, std: float) -> None:
    value = initial_weight(name, (512, DIM), DIM, seed=1)
    n = value.numel()
    assert abs(value.mean().item()) < 5 * std / n**0.5
    assert value.std().item() == pytest.approx(std, rel=5 / (2 * n) ** 0.5)
    if name == "lm_head.weight":
        assert value.abs().max().item() <= 3 * DIM**-0.5


def test_norms_are_one() -> None:
    for name in ("model.norm.weight", "model.layers.3.input_layernorm.weight"):
        assert torch.equal(initial_weight(name, (8,), DIM, seed=1), torch.ones(8))


def test_each_name_and_seed_has_its_own_draw_and_no_global_state() -> None:
    first = initial_weight("model.layers.0.mlp.up_proj.weight", (16, 16), DIM, seed=1)
    torch.manual_seed(99)
    assert torch.equal(first, initial_weight("model.layers.0.mlp.up_proj.weight", (16, 16), DIM, seed=1))
    assert not torch.equal(first, initial_weight("model.layers.0.mlp.up_proj.weight", (16, 16), DIM, seed=2))
    other = initial_weight("model.layers.0.self_attn.o_proj.weight", (16, 16), DIM, seed=1)
    assert not torch.equal(first, other)


def test_unknown_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="no parameter of a llama"):
        initial_weight("model.layers.0.mlp.router.weight", (2, 2), DIM, seed=0)
