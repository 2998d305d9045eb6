"""Names of the parts of a llama: torchtitan's, and those of the Hugging Face model."""

from __future__ import annotations

import pytest
import torch

from pipeline_lib.models import llama
from pipeline_lib.models.naming import (
    canonical_titan,
    from_canonical,
    is_transform_state,
    split_transform,
    titan_name,
    to_canonical,
)

SHAPE = {"dim": 32, "layers": 11, "heads": 4, "kv_heads": 2, "ffn": 48}
MODEL = {"family": "llama", **SHAPE, "vocab": 64, "max_seq_len": 16}


def test_every_parameter_makes_the_round_trip() -> None:
    with torch.device("meta"):
        names = list(llama.build(MODEL).state_dict())
    titan = [titan_name(name) for name in names]
    assert [canonical_titan(name) for name in titan] == names
    assert len(set(titan)) == len(names) == 3 + 9 * SHAPE["layers"]


@pytest.mark.parametrize(
    ("titan", "canonical"),
    [
        ("tok_embeddings.weight", "model.embed_tokens.weight"),
        ("output", "lm_head"),
        ("norm.weight", "model.norm.weight"),
        ("layers.10", "model.layers.10"),
        ("layers.10.attention", "model.layers.10.self_attn"),
        ("layers.1.attention.inner_attention", "model.layers.1.self_attn"),
        (
            "layers.1.attention.inner_attention.transform.kv.store.scale",
            "model.layers.1.self_attn.transform.kv.store.scale",
        ),
        ("layers.0._orig_mod._checkpoint_wrapped_module.feed_forward.w2", "model.layers.0.mlp.down_proj"),
        ("layers.0.feed_forward.w1.transform.fault0.scale", "model.layers.0.mlp.gate_proj.transform.fault0.scale"),
        ("layers.3.ffn_norm.weight", "model.layers.3.post_attention_layernorm.weight"),
    ],
)
def test_canonical_titan(titan: str, canonical: str) -> None:
    assert canonical_titan(titan) == canonical


@pytest.mark.parametrize("function", [canonical_titan, titan_name])
def test_unknown_names_are_refused(function) -> None:
    with pytest.raises(ValueError, match="no part of"):
        function("encoder.layer.0.weight")


def test_state_dicts() -> None:
    state = {"output.weight": 1, "layers.0.attention.wq.weight": 2, "layers.0.attention.wq.transform.store.scale": 3}
    named = to_canonical(state)
    assert list(named) == sorted(named)
    assert from_canonical(named) == state
    own, added = split_transform(named)
    assert own == {"lm_head.weight": 1, "model.layers.0.self_attn.q_proj.weight": 2}
    assert added == {"model.layers.0.self_attn.q_proj.transform.store.scale": 3}
    assert not is_transform_state("cls.predictions.transform.dense.weight"), "a part of BERT, not of a transform"
