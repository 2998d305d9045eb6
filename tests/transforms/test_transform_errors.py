"""What a user can get wrong, each answered by one message."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transform_toys.models import bert, llama, logits

from pipeline_lib.config.errors import UserError
from pipeline_lib.transforms.apply import apply

CASES: dict[str, tuple[list[dict[str, Any]], str]] = {
    "two stores": ([{"type": "toy_store"}, {"type": "toy_store"}], "one store at a site"),
    "two computes": (
        [{"type": "toy_compute", "sites": {"linear:*": {}}}, {"type": "toy_compute", "sites": {"lm_head": {}}}],
        "lm_head: a composition may have one compute at a site",
    ),
    "no site": ([{"type": "toy_fault", "sites": {"model.layers.*.mpl.*": {}}}], "the pattern matches no site"),
    "hidden": ([{"type": "toy_fault", "sites": {"*": {}, "lm_head": None}}], "the first match wins"),
    "override": ([{"type": "toy_fault", "sites": {"*": {"one_on": 3}}}], "unknown key"),
    "override type": ([{"type": "toy_fault", "sites": {"*": {"one_in": "many"}}}], "valid integer"),
    "sites type": ([{"type": "toy_fault", "sites": "*"}], "must map patterns"),
    "sites empty": ([{"type": "toy_fault", "sites": {}}], "must not be empty"),
    "nested sites": ([{"type": "toy_fault", "sites": {"*": {"sites": {}}}}], "without `sites`"),
    "unknown": ([{"type": "toy_folt"}], "did you mean 'toy_fault'?"),
    "kv and products": ([{"type": "toy_compute"}], "leaves no products"),
}


@pytest.mark.parametrize("name", CASES)
def test_one_message(name: str) -> None:
    composition, message = CASES[name]
    model = llama()
    tokens = torch.arange(8)[None]
    before = logits(model, tokens)
    with pytest.raises(UserError) as error:
        apply(model, composition, seed=0)
    assert message in str(error.value)
    assert torch.equal(logits(model, tokens), before)  # nothing half applied
    assert type(model.lm_head) is torch.nn.Linear


def test_unmatched_pattern_names_sites_near_it() -> None:
    with pytest.raises(UserError) as error:
        apply(llama(), [{"type": "toy_fault", "sites": {"model.layers.0.mlp.gate_prj": {}}}], seed=0)
    assert "did you mean 'model.layers.0.mlp.gate_proj'?" in str(error.value)
    assert "model.layers.0.self_attn.query_key" in str(error.value)


def test_forward_without_begin_is_refused() -> None:
    model = llama()
    apply(model, [{"type": "toy_fault"}], seed=0)
    with pytest.raises(RuntimeError, match="begin"):
        logits(model, torch.ones(1, 4, dtype=torch.long))


def test_applying_twice_is_refused() -> None:
    model = llama()
    apply(model, [{"type": "toy_fault"}], seed=0)
    with pytest.raises(RuntimeError, match="transformed already"):
        apply(model, [{"type": "toy_fault"}], seed=0)


@pytest.mark.parametrize(("global_batch", "devices"), [(8, 3), (2, 4), (8, 0)])
def test_unequal_shares_are_refused(global_batch: int, devices: int) -> None:
    with pytest.raises(UserError, match="must divide the global batch"):
        apply(llama(), [], seed=0, global_batch=global_batch, fault_devices=devices)


def test_shared_position_embeddings_cannot_differ_between_devices() -> None:
    model = bert()
    apply(model, [{"type": "toy_fault"}], seed=0, global_batch=2, fault_devices=2).context.begin(0, 0)
    with pytest.raises(UserError, match="position embeddings"):
        logits(model, torch.ones(2, 4, dtype=torch.long))


def test_plain_is_the_empty_list() -> None:
    model = llama()
    applied = apply(model, [], seed=0)
    applied.context.begin(0, 0)
    assert applied.report == {"settings": {}, "layers": {}, "histogram": {}}
    assert type(model.lm_head) is torch.nn.Linear
    assert model.config._attn_implementation == "sdpa"
