"""Which pattern decides about a site, and how the map survives a spec."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transform_toys.fault import Settings

from pipeline_lib.config.fingerprint import canonical
from pipeline_lib.transforms.base import Site
from pipeline_lib.transforms.patterns import matches, merge

GATE = Site("linear", "model.layers.11.mlp.gate_proj", (4, 4))


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*", True),
        ("model.layers.*.mlp.*", True),
        ("model.layers.*", True),
        ("linear:*", True),
        ("kv:*", False),
        ("linear:lm_head", False),
        ("model.layers.1.*", False),
        ("model.layers.1[01].*", True),
        ("gate_proj", False),
        ("*.gate_proj", True),
        ("MODEL.*", False),
    ],
)
def test_matches(pattern: str, expected: bool) -> None:
    assert matches(pattern, GATE) is expected


OVERRIDES = st.none() | st.dictionaries(st.sampled_from(["one_in"]), st.integers(1, 9))


@given(st.dictionaries(st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip), OVERRIDES, min_size=1))
def test_order_survives_a_spec(sites: dict[str, Any]) -> None:
    """Canonical JSON sorts keys; the order of patterns is meaning and must not be sorted."""
    settings = Settings.model_validate({"sites": sites})
    assert list(settings.sites) == list(sites.items())
    read = json.loads(canonical(settings.semantic()))
    assert Settings.model_validate(read) == settings


def test_merge_goes_deep() -> None:
    assert merge({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": None}, "d": {"e": 1}}) == {
        "a": {"b": None, "c": 2},
        "d": {"e": 1},
    }
