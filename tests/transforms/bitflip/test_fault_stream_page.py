"""docs/fault-stream.md: its settings are valid, its figures those of the benchmark, its tests real, as are those of docs/earlier-faults.md."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from benchmarks.report import FOLDER, table
from pipeline_lib.config.validate import validate
from pipeline_lib.transforms.bitflip import Settings

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "fault-stream.md").read_text()


def test_the_settings_are_valid() -> None:
    [block] = re.findall(r"^```yaml\n(.*?)^```", PAGE, flags=re.M | re.S)
    settings = validate(Settings, yaml.safe_load(block)["transforms"]["bitflip"], "the page")
    assert settings.shared_input
    assert settings.weight.bits == {"31": 0.0, "30": 1e-3}


def test_the_figures_are_those_of_the_benchmark() -> None:
    figures = json.loads((FOLDER / "bitflip_cpu.json").read_text())
    assert table(figures["rows"], figures["columns"]) in PAGE


@pytest.mark.parametrize("page", ["fault-stream.md", "earlier-faults.md"])
def test_the_tests_it_names_exist(page: str) -> None:
    named = re.findall(r"`(\w+\.py)?(?:::(\w+))?`", (ROOT / "docs" / page).read_text())
    files: dict[str, str] = {}
    for path in (ROOT / "tests").rglob("*.py"):
        files[path.name] = files.get(path.name, "") + path.read_text()
    checked, file = 0, ""
    for own, function in named:
        file = own or file
        if own:
            assert own in files, own
        if function:
            assert f"def {function}(" in files[file], f"{file}::{function}"
            checked += 1
    assert checked >= 10
