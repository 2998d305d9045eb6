"""Latent and packed weights under torch.compile, and a packed model whose positions are not the default ones."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline_lib.models import llama
from pipeline_lib.transforms.apply import apply
from pipeline_lib.transforms.packed import load_packed, pack, save_packed

SHAPE = {"dim": 64, "layers": 2, "heads": 4, "kv_heads": 2, "ffn": 96, "vocab": 80, "max_seq_len": 16}


def model() -> llama.LlamaForCausalLM:
    torch.manual_seed(0)
    return llama.build(SHAPE).eval()


@torch.no_grad()
def logits(made: nn.Module) -> Tensor:
    return made(torch.arange(32).view(2, 16)).logits


def test_it_compiles_without_a_break() -> None:
    """Latent weights in training, with their gradient; and held packed."""
    layer = nn.Sequential(nn.Linear(64, 24))
    applied = apply(layer, [{"type": "int2", "group_size": 32, "sites": {"*": {}}}], seed=0)
    applied.context.begin(0, 0)
    x, gradients = torch.randn(4, 3, 64), []
    for model in (torch.compile(layer, backend="eager", fullgraph=True), layer):
        y = model(x)
        y.square().sum().backward()
        gradients.append(layer[0].weight.grad)
        layer[0].weight.grad = None
    torch.testing.assert_close(*gradients)
    pack(applied)
    torch._dynamo.reset()
    packed = torch.compile(layer, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(packed(x), layer(x))


def test_rotary_positions_survive_packing(tmp_path: Path) -> None:
    """A base of 500,000 and Llama 3's scaling are part of the packed checkpoint, not constants of who reads it."""
    scaling = {
        "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8,
    }  # fmt: skip
    config = model().config
    config.rope_parameters = scaling
    torch.manual_seed(0)
    made = type(model())(config).eval()
    plain = copy.deepcopy(made)
    applied = apply(made, [{"type": "int2", "group_size": 32, "format": "int8-asym"}], seed=0)
    applied.context.begin(0, 0)
    pack(applied)
    save_packed(tmp_path / "packed", made, applied, torch.float32)
    loaded, again = load_packed(tmp_path / "packed")
    again.context.begin(0, 0)
    assert loaded.config.rope_parameters == made.config.rope_parameters
    torch.testing.assert_close(logits(loaded), logits(made), rtol=1e-5, atol=1e-5)
    other = model()
    other.load_state_dict(plain.state_dict())
    assert (logits(other) - logits(plain)).abs().max() > 1e-3, "positions matter to these logits"
