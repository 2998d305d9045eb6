"""What the page on bit flips shows in YAML is accepted, laid over the repository's own config.yaml."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from pipeline_lib.config.load import merge, read_yaml
from pipeline_lib.config.plan import Plan
from tests.workflow.clone import ROOT

BLOCKS = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "docs" / "bitflip.md").read_text(), flags=re.M | re.S)
TARGETS = [
    "results/bitflip-nano/pydocs.json",
    "results/bitflip-llama-3.1-8b/wikitext.json",
    "results/sweeps/which-bits.svg",
]


@pytest.mark.parametrize(("block", "target"), list(zip(BLOCKS, TARGETS, strict=True)))
def test_a_block_plans(block: str, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = merge(read_yaml(ROOT / "config.yaml"), yaml.safe_load(block))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    node, _ = Plan.load().view(target)
    assert node.stage in ("result", "sweep")


def test_the_sweep_shown_is_the_one_in_config_yaml() -> None:
    shown = yaml.safe_load(BLOCKS[2])["sweeps"]["which-bits"]
    assert shown == read_yaml(ROOT / "config.yaml")["sweeps"]["flip-kinds"]
