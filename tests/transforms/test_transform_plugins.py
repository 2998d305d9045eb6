"""A transform comes from a folder, an entry point or a call, and nothing else is touched; the docs' example works."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from transform_toys.models import llama, logits

from pipeline_lib.config.registry import TRANSFORMS, Registry
from pipeline_lib.transforms.apply import apply

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "add-a-transform.md"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """The registry of an environment in which a package brings the page's example."""
    module, _ = blocks("python")
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "__init__.py").touch()
    (tmp_path / "my_package" / "stuck.py").write_text(module)
    about = tmp_path / "my_package-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    points = tomllib.loads(blocks("toml")[0])["project"]["entry-points"]["errata.transforms"]
    lines = ["[errata.transforms]", *(f"{name} = {module}" for name, module in points.items())]
    (about / "entry_points.txt").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(vars(TRANSFORMS), "_paths", raising=False)
    registry = Registry(TRANSFORMS.kind, TRANSFORMS.package, TRANSFORMS.group, packages_only=True)
    monkeypatch.setitem(vars(TRANSFORMS), "_paths", registry._paths)
    return registry


def blocks(language: str) -> list[str]:
    """The code blocks of the page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def test_example_of_the_page(installed: Registry) -> None:
    assert "stuck" in installed.names()
    _, test = blocks("python")
    exec(compile(test, str(PAGE), "exec"), {})


def test_entry_of_the_page(installed: Registry) -> None:
    import yaml

    settings = yaml.safe_load(blocks("yaml")[0])["transforms"]["stuck"]
    tokens = torch.ones(1, 4, dtype=torch.long)
    model = llama()
    before = logits(model, tokens)
    applied = apply(model, [{"type": "stuck", **settings, "p": 0.5}], seed=0)
    applied.context.begin(0, 0)
    assert not torch.equal(logits(model, tokens), before)
    assert applied.report["histogram"] == {
        "0:stuck:model.layers.0.*": {"linear": 7},
        "0:stuck:linear:*": {"linear": 7},
    }
    again = installed.load("stuck").Settings(type="stuck", **settings)
    assert installed.load("stuck").Settings(**again.semantic()) == again


def test_settings_are_read_without_torch() -> None:
    """Every registered transform, and what its settings need."""
    code = (
        "import sys; from pipeline_lib.config.registry import TRANSFORMS\n"
        "import pipeline_lib.transforms.base, pipeline_lib.transforms.patterns\n"
        "for name in TRANSFORMS.names():\n"
        "    module = TRANSFORMS.load(name); module.Settings; module.build\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
