"""Parameter counts of the published model table, by formula and in the models themselves, built on meta."""

from __future__ import annotations

import pytest
import torch

from pipeline_lib.config.models import count_parameters
from pipeline_lib.models import bert, llama

# dim, layers, heads, kv heads, ffn; parameters without the input embedding, and all of them (vocabulary 49,152)
SIZES = {
    "60m": (384, 22, 6, 2, 1408, 63_226_752, 82_101_120),
    "200m": (768, 24, 12, 4, 2688, 224_170_752, 261_919_488),
    "400m": (960, 30, 15, 5, 3328, 408_511_680, 455_697_600),
    "600m": (1152, 32, 18, 6, 4096, 622_929_024, 679_552_128),
    "1.1b": (1536, 32, 24, 8, 5376, 1_069_647_360, 1_145_144_832),
}


@pytest.mark.parametrize("name", SIZES)
def test_llama_sizes(name: str) -> None:
    dim, layers, heads, kv_heads, ffn, without_embedding, total = SIZES[name]
    model = {"family": "llama", "dim": dim, "layers": layers, "heads": heads, "kv_heads": kv_heads, "ffn": ffn}
    model |= {"vocab": 49_152, "max_seq_len": 2048}
    assert count_parameters(model) == (total, without_embedding)
    with torch.device("meta"):
        built = llama.build(model)
    assert sum(parameter.numel() for parameter in built.parameters()) == total
    assert total - built.get_input_embeddings().weight.numel() == without_embedding
    assert built.config.rope_parameters["rope_type"] == "default"
    assert built.lm_head.weight is not built.get_input_embeddings().weight


def test_torchtitan_builds_the_same_sizes() -> None:
    from pipeline_lib.training.titan.device import prepare

    prepare()
    from pipeline_lib.training.titan.model import TitanLlama, model_args

    for dim, layers, heads, kv_heads, ffn, _, total in SIZES.values():
        model = {"dim": dim, "layers": layers, "heads": heads, "kv_heads": kv_heads, "ffn": ffn}
        with torch.device("meta"):
            built = TitanLlama(model_args({**model, "family": "llama", "vocab": 49_152, "max_seq_len": 64}, seed=0))
        assert sum(parameter.numel() for parameter in built.parameters()) == total
        assert built.layers["0"].feed_forward.w1.weight.shape == (ffn, dim)


def test_bert_size() -> None:
    model = {"family": "bert", "dim": 64, "layers": 3, "heads": 4, "ffn": 128, "vocab": 500, "max_seq_len": 48}
    with torch.device("meta"):
        built = bert.build(model)
    assert sum(p.numel() for p in built.parameters()) == count_parameters(model)[0] + 48 * 64
    assert built.config.layer_norm_eps == 1e-12
