"""Compositions that cannot be are refused before there is a model."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from pipeline_lib.config.compositions import LAYERS
from pipeline_lib.config.errors import UserError
from pipeline_lib.config.models import ARCHITECTURES
from pipeline_lib.config.plan import Plan
from pipeline_lib.config.registry import TRANSFORMS
from pipeline_lib.config.schema import Config
from pipeline_lib.transforms.base import Site
from pipeline_lib.transforms.sites import find_sites
from tests.matrix.cells import presets
from tests.workflow.clone import TINY

MLP, ATTENTION = {"sites": {"*.mlp.*": {}}}, {"sites": {"*.self_attn.*": {}}}


def plan(transform: Any) -> Plan:
    made = {**TINY, "transforms": {name: {} for name in ("int2", "ternary", "optical", "analog")}}
    made["transforms"]["bitflip"] = TINY["transforms"]["bitflip"]
    recipe = TINY["models"]["tiny"]["recipe"]
    made["experiments"] = {"x": {"model": "tiny", "transform": transform, "recipe": recipe}}
    return Plan(Config(**{**made, "sweeps": {}}))


@pytest.mark.parametrize(
    ("transform", "words"),
    [
        ("int2+ternary", "int2 and ternary cannot be combined at one layer: a layer has one store"),
        ("ternary+analog", "ternary and analog cannot be combined at one layer: a layer has one store"),
        ("optical+analog", "optical and analog cannot be combined at one layer: a layer has one compute"),
        ({"int2": MLP, "ternary": MLP}, "both act at model.layers.0.mlp.down_proj"),
        ("bitflip+bitflip", "a transform is named twice"),
    ],
)
def test_refused(transform: Any, words: str) -> None:
    with pytest.raises(UserError, match=r"x\.transform") as error:
        plan(transform).resolver.experiments.get("x")
    assert words in str(error.value)


@pytest.mark.parametrize(
    "transform",
    ["int2+bitflip", "ternary+optical", {"int2": MLP, "ternary": ATTENTION}, {"bitflip": None, "ternary": {}}],
)
def test_allowed(transform: Any) -> None:
    found = plan(transform).resolver.experiments.get("x").transform
    assert [entry["type"] for entry in found] == (
        transform.split("+") if isinstance(transform, str) else list(transform)
    )


@pytest.mark.parametrize("name", sorted({preset.get("type", name) for name, preset in presets().items()} - {"plain"}))
def test_what_a_transform_says_it_is(name: str) -> None:
    """At the layers that are looked at, it gives just those functions."""
    module = TRANSFORMS.load(name)
    made = module.build(module.Settings(**next((p for n, p in presets().items() if p.get("type", n) == name), {})))
    for layers in LAYERS.values():
        for layer in layers:
            site = Site("linear", layer, (64, 64))
            store, compute = made.store(site), made.compute(site)
            kinds = {"store"} if store else set()
            kinds |= {"compute"} if compute or (store and store.in_memory) else set()
            assert set(getattr(module, "AT_LINEAR", ())) == kinds


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_the_layers_that_are_looked_at_exist(family: str) -> None:
    shape = {
        "dim": 16,
        "layers": 1,
        "heads": 2,
        "kv_heads": 2,
        "ffn": 32,
        "vocab": 32,
        "max_seq_len": 8,
        "norm_eps": 1e-5,
    }
    model = importlib.import_module(f"pipeline_lib.models.{family}").build({**shape, "family": family})
    assert set(LAYERS[family]) <= {found.site.name for found in find_sites(model)}
