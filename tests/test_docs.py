"""Every command in README and docs is real: run, or planned where running would take a GPU or minutes."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from pipeline_lib.__main__ import COMMANDS
from pipeline_lib.config.load import merge, read_yaml
from tests.workflow.clone import Clone

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "CONTRIBUTING.md"]


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), flags=re.M | re.S)


def commands() -> list[tuple[str, str]]:
    """(page, line) of every shell line."""
    return [
        (path.relative_to(ROOT).as_posix(), line)
        for path in PAGES
        for block in blocks(path, "sh")
        for line in block.splitlines()
        if line.strip() and not line.startswith("#")
    ]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    return Clone.make(tmp_path_factory.mktemp("docs"), read_yaml(ROOT / "config.yaml"))


def test_there_are_commands() -> None:
    assert ("README.md", "make demo") in commands()


@pytest.mark.parametrize(("page", "line"), commands())
def test_command(page: str, line: str, clone: Clone) -> None:
    words = shlex.split(line, comments=True)
    if words[0] == "make":
        subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True)
    elif words[0] == "snakemake":
        clone.snakemake("-n", *words[1:])
    elif words[:3] == ["python", "-m", "pipeline_lib"]:
        clone.run(*words[3:])
    elif words[:2] == ["python", "-m"]:
        module = ROOT.joinpath(*words[2].split("."))
        assert module.with_suffix(".py").exists(), line
    else:
        pytest.fail(f"{page}: no test knows how to check this line: {line}")


def test_readme_experiment_plans(clone: Clone) -> None:
    """The first experiment of the README, laid over config.yaml."""
    [block] = blocks(ROOT / "README.md", "yaml")
    clone.write_config(merge(read_yaml(ROOT / "config.yaml"), yaml.safe_load(block)))
    output = clone.snakemake("-n", "results/gentle-nano/pydocs.json")
    assert "rule train" in output
    clone.write_config(read_yaml(ROOT / "config.yaml"))


def test_readme_lists_every_command() -> None:
    text = (ROOT / "README.md").read_text()
    shown = {name for name in COMMANDS if f"python -m pipeline_lib {name}" in text}
    assert shown >= set(COMMANDS) - {"stage", "view", "demo", "versions"}


def test_links_lead_somewhere() -> None:
    missing = []
    for path in PAGES:
        for target in re.findall(r"\]\(([^)#]+)", path.read_text()):
            if not target.startswith("http") and not (path.parent / target).exists():
                missing.append(f"{path.name}: {target}")
    assert not missing, missing
