"""What docs/finetune.md says can be typed, and its figures, are true of today's configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline_lib.config.load import merge, read_yaml
from pipeline_lib.config.plan import Plan
from pipeline_lib.config.registry import RECIPES
from pipeline_lib.training.recipes.finetune import TOKENS_PER_PARAMETER, Lora, Settings
from tests.conftest import ROOT
from tests.test_docs import blocks

PAGE = ROOT / "docs" / "finetune.md"
NAME = "bitflip-llama-3.1-8b"


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """config.yaml with what the page adds to it."""
    hub, untuned, _ = (yaml.safe_load(block) for block in blocks(PAGE, "yaml"))
    config = merge(merge(read_yaml(ROOT / "config.yaml"), hub), untuned)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return Plan.load(str(tmp_path / "config.yaml"))


def test_the_hub_llama_is_planned_as_the_page_says(plan: Plan) -> None:
    experiment = plan.resolver.experiments.get(NAME)
    train = plan.resolver.train(experiment)
    recipe = train.settings["recipe"]
    tokens = recipe["steps"] * recipe["global_batch"] * recipe["seq_len"]
    assert f"{tokens / 1e6:.1f} M tokens (1 % of the parameters; {recipe['steps']:,} steps)" in PAGE.read_text()
    assert recipe["method"] == "lora"
    assert train.inputs["init"].settings["repo"] == "meta-llama/Llama-3.1-8B"
    tuned, untuned = (plan.view(f"results/{name}/wikitext.json")[0] for name in (NAME, "llama-untuned"))
    arms = [node.inputs["transformed"].settings["transform"] for node in (tuned, untuned)]
    assert arms[0] == arms[1] == experiment.transform


def test_the_defaults_of_the_table_are_those_of_the_recipe() -> None:
    text, fields, lora = PAGE.read_text(), Settings.model_fields, Lora.model_fields
    assert f"| `method` | `{fields['method'].default}` |" in text
    assert f"| {lora['r'].default}, {lora['alpha'].default:g} |" in text
    assert f'| `["{lora["targets"].default[0]}"]` |' in text
    budget = f"{TOKENS_PER_PARAMETER['lora']} (lora), {TOKENS_PER_PARAMETER['full']} (full) tokens per parameter"
    assert budget in text
    assert f"| {fields['global_batch'].default}, {fields['seq_len'].default} |" in text


def test_the_clipping_settings_are_valid() -> None:
    example: dict[str, Any] = yaml.safe_load(blocks(PAGE, "yaml")[-1])["recipe"]
    for recipe, given in example.items():
        settings = RECIPES.load(recipe).Settings(steps=1, **given)
        assert settings.clip_weights
