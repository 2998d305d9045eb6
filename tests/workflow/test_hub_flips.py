"""Post-training evaluation of a hub checkpoint under bit flips, through Snakemake: results, texts, ranges, a sweep."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from pipeline_lib.transforms.bitflip import Settings as BitFlip
from tests.evaluation.conftest import checkpoint  # noqa: F401  (a fixture)
from tests.hub import FakeHub
from tests.workflow.clone import Clone

pytestmark = pytest.mark.slow

MODEL = "tests/tiny-llama"
SEEDS = 3
WORDS = {"source": {"type": "local", "path": "data/*.jsonl"}, "split": {"valid": 0.2, "test": 0.2}}
CONFIG: dict[str, Any] = {
    "datasets": {"words": WORDS},
    "models": {"hubllama": {"hub": {"repo": MODEL}, "tasks": ["documents", "generate"], "dtype": "float32"}},
    "transforms": {
        "plain": {},
        "bitflip": {
            "weight": {"p_exp": 0.0, "p_frac": 2.0**-6, "zero_out": 8.0},
            "input": {"p_exp": 2.0**-16, "p_frac": 2.0**-8, "bits": {30: 0.0}, "zero_out": 60.0},
            "sites": {"model.layers.0.self_attn.*": None, "*.down_proj": {"input": {"p_frac": 0.0}}, "*.layers.*": {}},
        },
    },
    "tasks": {
        "documents": {"type": "lm_eval", "task": "documents", "dataset": "words", "max_length": 32, "limit": 3},
        "generate": {"type": "generate", "file": "prompts.txt", "max_new_tokens": 8},
        "ranges": {"type": "ranges", "dataset": "words", "sequences": 4},
    },
    "experiments": {"bitflip-hubllama": {}},
    "sweeps": {
        "texts": {
            "experiment": "bitflip-hubllama",
            "task": "generate",
            "grid": {"p": [0.0, 0.5], "operand": {"weights": "weight", "activations": "input"}},
            "settings": {"transform.bitflip.{operand}.p_frac": "{p}"},
        }
    },
    "fault_seeds": SEEDS,
    "tracking": {"wandb": "off"},
}
OWN = "results/bitflip-hubllama/"
TARGETS = (
    f"{OWN}documents.json", f"{OWN}generate.json", f"{OWN}generate.md", f"{OWN}generate.jsonl",
    "results/plain-hubllama/ranges.json", "results/plain-hubllama/ranges.yaml", "results/plain-hubllama/ranges.md",
    "results/sweeps/texts.csv", "results/sweeps/texts.md", "results/sweeps/texts.jsonl", "results/sweeps/texts.svg",
    "results/sweeps/texts.png",
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clone]:
    """All targets made, from a hub on loopback."""
    with FakeHub() as hub, pytest.MonkeyPatch.context() as patch:
        hub.add("model", MODEL, {path.name: path.read_bytes() for path in checkpoint.iterdir()})
        for name, value in hub.env().items():
            patch.setenv(name, value)
        clone = Clone.make(tmp_path_factory.mktemp("hub-flips") / "clone", CONFIG)
        (clone.root / "prompts.txt").write_text("the small model\nit rains on trees\n")
        clone.snakemake(*TARGETS)
        yield clone


def result(clone: Clone, target: str) -> Any:
    return json.loads((clone.root / target).read_text())["result"]


def records(clone: Clone, target: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (clone.root / target).read_text().splitlines()]


def test_the_result_has_both_arms_and_error_bars(finished: Clone) -> None:
    arms = result(finished, f"{OWN}documents.json")
    clean, faulty = (arms[arm]["metrics"]["byte_perplexity"] for arm in ("clean", "transformed"))
    assert (clean["n"], clean["stderr"]) == (1, None)
    assert (faulty["n"], len(set(faulty["values"]))) == (SEEDS, SEEDS)
    assert faulty["stderr"] > 0
    assert faulty["mean"] != clean["mean"]
    replaced = arms["transformed"]["transform_report"]
    names = [f"0:bitflip:{pattern}" for pattern in ("*.down_proj", "*.layers.*")]
    assert {name: replaced["histogram"][name] for name in names} == {names[0]: {"linear": 2}, names[1]: {"linear": 8}}
    assert not any(layer.startswith("model.layers.0.self_attn") or layer == "lm_head" for layer in replaced["layers"])
    assert replaced["settings"][names[0]]["input"]["p_frac"] == 0.0
    assert replaced["settings"][names[1]]["input"]["bits"] == {"30": 0.0}


def test_texts_stand_side_by_side(finished: Clone) -> None:
    lines = records(finished, f"{OWN}generate.jsonl")
    assert [(line["arm"], line["fault_seed"]) for line in lines[::2]] == [
        ("clean", None), *(("transformed", seed) for seed in range(SEEDS))
    ]  # fmt: skip
    assert {line["before"] for line in lines} == {"the small model", "it rains on trees"}
    page = (finished.root / OWN / "generate.md").read_text()
    assert page.count("| clean |") == 2
    assert page.count("| transformed |") == 2 * SEEDS
    arms = result(finished, f"{OWN}generate.json")
    assert arms["clean"]["metrics"]["same_tokens"]["mean"] == 1.0
    mine = [line for line in lines if line["arm"] == "transformed"]
    by_seed = [
        sum(line["same"] for line in mine if line["fault_seed"] == seed)
        / sum(line["of"] for line in mine if line["fault_seed"] == seed)
        for seed in range(SEEDS)
    ]
    assert arms["transformed"]["metrics"]["same_tokens"]["values"] == by_seed


def test_thresholds_can_be_pasted(finished: Clone) -> None:
    sites = yaml.safe_load((finished.root / "results/plain-hubllama/ranges.yaml").read_text())["sites"]
    assert len(BitFlip(sites=sites).sites) == 14
    assert "model.layers.1.mlp.down_proj" in (finished.root / "results/plain-hubllama/ranges.md").read_text()


def test_a_sweep_of_texts(finished: Clone) -> None:
    rows = list(csv.DictReader((finished.root / "results/sweeps/texts.csv").open()))
    assert [(row["p"], row["operand"]) for row in rows] == [
        ("0.0", "weights"), ("0.0", "activations"), ("0.5", "weights"), ("0.5", "activations")
    ]  # fmt: skip
    lines = records(finished, "results/sweeps/texts.jsonl")
    arms = list(dict.fromkeys(line["arm"] for line in lines))
    assert arms[:2] == ["clean", "p = 0, operand = weights"]
    assert len(arms) == 5
    assert "| p = 0.5, operand = activations | 2 |" in (finished.root / "results/sweeps/texts.md").read_text()
    ElementTree.fromstring((finished.root / "results/sweeps/texts.svg").read_text())
    assert (finished.root / "results/sweeps/texts.png").read_bytes().startswith(b"\x89PNG")


def test_one_process_evaluates_the_sweep_and_a_rerun_none(finished: Clone) -> None:
    assert finished.would_run(*TARGETS) == {}
    (finished.root / "prompts.txt").write_text("the small model\nanother prompt\n")
    targets = [target for target in TARGETS if target.startswith("results/sweeps")]
    assert finished.would_run(*targets) == {"sweep": 1, "sweep_result": len(targets)}, "its prompts changed"
    (finished.root / "prompts.txt").write_text("the small model\n\nit rains on trees")
    assert finished.would_run(*TARGETS) == {}, "the file is another, the prompts are not"
