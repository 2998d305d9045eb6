"""Every key is explained: those of the sections by a comment in config.yaml, all of them in docs/config.md."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline_lib.config.base import Settings
from pipeline_lib.config.reference import PLUGINS, page, parts
from pipeline_lib.config.schema import Config

ROOT = Path(__file__).resolve().parents[2]


def keys(settings: type[Settings]) -> Iterator[tuple[str, str]]:
    """(class, key) of the sections, what is below them included."""
    for name, field in settings.model_fields.items():
        if name != "family" or field.description:
            yield settings.__name__, field.alias or name
        for part in parts(field.annotation):
            yield from keys(part)


def comments() -> str:
    """The comments of config.yaml, and with each what it stands behind."""
    lines = (ROOT / "config.yaml").read_text().splitlines()
    return "\n".join(line for line in lines if "#" in line)


@pytest.mark.parametrize(("section", "key"), sorted(set(keys(Config))))
def test_config_yaml_explains_the_key(section: str, key: str) -> None:
    named = rf"(^|[\s(#]){key}(:|,|;|\)| \(|( and|,) [\w, ]+:)"
    headed = rf"^# -+ {key}:"
    own_section = section == "Config" and re.search(rf"^{key}:", (ROOT / "config.yaml").read_text(), flags=re.M)
    assert own_section or re.search(named, comments(), flags=re.M) or re.search(headed, comments(), flags=re.M)


def test_the_page_is_current() -> None:
    assert (ROOT / "docs" / "config.md").read_text() == page(), (
        "run `python -m pipeline_lib.config.reference > docs/config.md`"
    )


def test_the_page_has_every_plugin_and_every_meaning() -> None:
    text = page()
    for _, registry in PLUGINS:
        assert all(f"### {name}\n" in text for name in registry.names())
    assert not re.findall(r"^\| `.*\|  \|$", text, flags=re.M), "a key without a description"
