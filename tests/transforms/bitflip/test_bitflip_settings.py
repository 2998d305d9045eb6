"""The settings of the transform: what is refused and in which words, and what a spec keeps."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from pipeline_lib.config.errors import UserError
from pipeline_lib.config.validate import validate
from pipeline_lib.transforms.bitflip import Settings


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"weight": {"p": 1.5}}, ["weight.p", "1.5", "[0, 1]"]),
        ({"weight": {"p": -0.1}}, ["weight.p", "-0.1", "[0, 1]"]),
        ({"input": {"p_exp": 1e-30}}, ["input.p_exp", "1e-30", "2^-50"]),
        ({"input": {"p_frac": float("nan")}}, ["input.p_frac", "nan"]),
        ({"input": {"zero_out": -1.0}}, ["input.zero_out", "-1.0", "at least 0"]),
        ({"input": {"zero_out": float("inf")}}, ["input.zero_out", "finite"]),
        ({"wieght": {}}, ["wieght", "did you mean 'weight'?"]),
        ({"weight": {"p_fraction": 0.1}}, ["p_fraction", "did you mean 'p_frac'?"]),
        ({"weight": None}, ["weight"]),
        ({"sites": {"*.mlp.*": {"input": {"p": 2}}}}, ["sites.*.mlp.*.input.p", "[0, 1]"]),
        ({"sites": {"*.mlp.*": {"inptu": {"p": 0.2}}}}, ["sites.*.mlp.*.inptu", "input"]),
        ({"sites": {"*.mlp.*": {"input": {"{p}": 0.2}}}}, ["{p}", "p_frac"]),
        ({"sites": {}}, ["sites"]),
        ({"weight": {"bits": {32: 0.1}}}, ["weight.bits", "32", "0, the least significant bit, to 31"]),
        ({"weight": {"bits": {"sign": 0.1}}}, ["weight.bits", "sign"]),
        ({"weight": {"bits": {3: 1.5}}}, ["weight.bits.3", "1.5", "[0, 1]"]),
        ({"weight": {"bits": [0.1]}}, ["weight.bits"]),
    ],
)
def test_wrong_settings_are_told_in_one_message(settings: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        validate(Settings, settings, "config.yaml: transforms.bitflip")
    for word in ["config.yaml: transforms.bitflip", *words]:
        assert word in str(error.value)


def test_settings_survive_a_spec() -> None:
    given = {
        "weight": {"p": 1e-3, "zero_out": 1.25},
        "sites": {"*.q_proj": {"input": {"p": 0.5}}, "*.layers.*": {}, "*": None},
    }
    settings = Settings.model_validate(given)
    assert Settings.model_validate(settings.semantic()) == settings
    # Settings that came later are left out at their defaults: fingerprints of older results stay.
    assert settings.semantic()["weight"] == {"p": 1e-3, "p_exp": None, "p_frac": None, "zero_out": 1.25}
    assert not {"chip_seed", "shared_input"} & set(settings.semantic())
    changed = Settings.model_validate({**given, "chip_seed": 1, "weight": {"stuck_at_0": 0.1}}).semantic()
    assert (changed["chip_seed"], changed["weight"]["stuck_at_0"]) == (1, 0.1)


def test_settings_are_read_without_torch() -> None:
    code = (
        "import sys; from pipeline_lib.transforms.bitflip import Settings\n"
        "Settings(weight={'p': 1e-3}); sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_bits_survive_a_spec_and_patterns_change_single_ones() -> None:
    given: dict[str, Any] = {"weight": {"bits": {31: 0.5, 3: 1e-3}}, "sites": {"*": {"weight": {"bits": {3: 0.0}}}}}
    settings = Settings.model_validate(given)
    assert Settings.model_validate(settings.semantic()) == settings
    assert settings.semantic()["weight"]["bits"] == {"31": 0.5, "3": 1e-3}
    assert settings.at(settings.sites[0][1] or {}).weight.bits == {"31": 0.5, "3": 0.0}
    assert "bits" not in Settings().semantic()["weight"], "results made before there were such settings stand"


@pytest.mark.parametrize(
    ("given", "random"),
    [
        ({}, False),
        ({"weight": {"p": 1.0, "zero_out": 2.0}}, False),
        ({"weight": {"p": 1e-9}}, True),
        ({"input": {"p_exp": 0.5}}, True),
        ({"input": {"bits": {0: 0.5}}}, True),
        ({"sites": {"*.mlp.*": {"weight": {"p": 0.1}}, "*": {}}}, True),
        ({"key": {"p": 0.1}}, True),
    ],
)
def test_only_chance_needs_fault_seeds(given: dict[str, Any], random: bool) -> None:
    assert Settings.model_validate(given).random_faults is random
