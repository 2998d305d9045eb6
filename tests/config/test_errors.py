"""Bad configurations: one message naming file, key, value, what is allowed and the fix; within seconds, before any work."""

from __future__ import annotations

import copy
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline_lib.config.errors import UserError
from pipeline_lib.config.load import read_yaml
from pipeline_lib.config.plan import Plan

ROOT = Path(__file__).resolve().parents[2]
BASE = read_yaml(ROOT / "config.yaml")
DELETE = object()


def edited(path: str, value: Any) -> dict[str, Any]:
    """The repository's config with one key set (or deleted)."""
    config = copy.deepcopy(BASE)
    *parents, last = path.split("/")
    place = config
    for part in parents:
        if place.get(part) is None:
            place[part] = {}
        place = place[part]
    if value is DELETE:
        del place[last]
    else:
        place[last] = value
    return config


# name: (key path, value, target to plan, words the message must hold)
CASES: dict[str, tuple[str, Any, str, list[str]]] = {
    "unknown section": ("experimnts", {}, "", ["experimnts", "unknown key", "experiments"]),
    "unknown key": ("models/nano/dimension", 3, "", ["models.nano.dimension", "unknown key", "llama"]),
    "unknown key in run": ("run/gpu", 2, "", ["run.gpu", "gpus"]),
    "wrong type": ("models/nano/llama/dim", "wide", "", ["models.nano.llama.dim", "wide", "integer"]),
    "truth value for a number": ("models/nano/llama/layers", True, "", ["models.nano.llama.layers", "true or false", "True"]),
    "truth value for a probability": ("transforms/bitflip/weight/p", True, "results/bitflip-60m/wikitext.json", ["transforms.bitflip.weight.p", "true or false"]),
    "negative": ("models/nano/llama/layers", 0, "", ["models.nano.llama.layers", "0"]),
    "heads do not divide dim": ("models/nano/llama/heads", 3, "", ["models.nano.llama", "3", "128", "divide"]),
    "kv heads do not divide heads": ("models/nano/llama/kv_heads", 3, "", ["kv_heads", "3", "4"]),
    "two kinds of model": ("models/nano/hub", {"repo": "a/b"}, "", ["models.nano", "exactly one of"]),
    "no tokenizer": ("models/nano/tokenizer", DELETE, "", ["models.nano", "tokenizer"]),
    "unknown tokenizer": ("models/nano/tokenizer", "bpe", "results/plain-nano/pydocs.json", ["models.nano.tokenizer", "bpe", "cosmo2"]),
    "hub tokenizer without vocab": ("tokenizers/cosmo2/vocab", DELETE, "", ["tokenizers.cosmo2", "vocab"]),
    "p above 1": ("transforms/bitflip/weight/p", 1.5, "results/bitflip-60m/wikitext.json", ["transforms.bitflip", "1.5"]),
    "p below 0": ("transforms/bitflip/input/p", -0.1, "results/bitflip-60m/wikitext.json", ["transforms.bitflip", "-0.1"]),
    "p too small": ("transforms/bitflip/weight/p", 1e-30, "results/bitflip-60m/wikitext.json", ["1e-30", "2"]),
    "unknown transform setting": ("transforms/bitflip/wieght", {}, "results/bitflip-60m/wikitext.json", ["wieght", "weight"]),
    "unknown transform": ("experiments/x", {"model": "nano", "transform": "bitflop"}, "", ["experiments.x.transform", "bitflop", "bitflip"]),
    "unknown model": ("experiments/x", {"model": "namo"}, "", ["experiments.x.model", "namo", "nano"]),
    "unknown recipe": ("experiments/x", {"model": "nano", "recipe": "pretrane"}, "", ["experiments.x.recipe", "pretrane", "pretrain"]),
    "unknown method": ("experiments/x", {"model": "nano", "recipe": {"cram": {"steps": 1, "methods": ["layer-hopping"]}}}, "", ["recipe.cram.methods", "layer-hopping", "layer-dropping"]),
    "unknown dataset": ("experiments/x", {"model": "nano", "dataset": "pydoc"}, "", ["experiments.x.dataset", "pydoc", "pydocs"]),
    "unknown task": ("experiments/x", {"model": "nano", "tasks": ["wiki"]}, "", ["experiments.x.tasks", "wiki", "wikitext"]),
    "unknown task in target": ("seed", DELETE, "results/plain-nano/pydoc.json", ["pydoc", "pydocs"]),
    "unknown experiment in target": ("seed", DELETE, "results/plane-nano/pydocs.json", ["plane-nano", "plain-nano"]),
    "unknown sweep in target": ("seed", DELETE, "results/sweeps/flips.csv", ["flips", "flip-probability"]),
    "unknown target": ("seed", DELETE, "results/a/b/c.json", ["results/a/b/c.json", "results/<experiment>/<task>.json"]),
    "circle": ("experiments/x", {"from": "y"}, "", ["circle", "x", "y"]),
    "self": ("experiments/x", {"from": "x"}, "", ["circle", "x"]),
    "teacher is no experiment": ("experiments/x", {"model": "nano", "teacher": "nobody"}, "", ["experiments.x.teacher", "nobody"]),
    "name clash": ("experiments/bitflip-60m", {"model": "200m", "transform": "bitflip"}, "", ["bitflip-60m", "200m", "another name"]),
    "name with ..": ("experiments/..x", {"model": "nano"}, "", ["..x", "valid name"]),
    "name with slash": ("experiments/../x", {}, "", ["valid name"]),
    "name with ;": ("experiments/x;rm", {"model": "nano"}, "", ["x;rm", "valid name"]),
    "name with space": ("experiments/a b", {"model": "nano"}, "", ["a b", "valid name"]),
    "name with newline": ("experiments/a\nb", {"model": "nano"}, "", ["valid name"]),
    "name too long": ("experiments/" + "x" * 5000, {"model": "nano"}, "", ["valid name"]),
    "name of a folder of ours": ("experiments/store", {"model": "nano"}, "", ["store", "valid name"]),
    "dash in a transform's name": ("transforms/bit-flip", {"type": "bitflip"}, "", ["bit-flip"]),
    "sweep over nothing": ("sweeps/flip-probability/grid", {"transform.bitflip.weight.q": [1]}, "results/sweeps/flip-probability.csv", ["sweeps.flip-probability", "transform.bitflip.weight.q", "p_exp"]),
    "sweep over a deeper nothing": ("sweeps/flip-probability/grid", {"recipe.none.lr": [1]}, "results/sweeps/flip-probability.csv", ["recipe.none.lr"]),
    "sweep value out of range": ("sweeps/flip-probability/grid", {"transform.bitflip.weight.p": [2.0]}, "results/sweeps/flip-probability.csv", ["2.0"]),
    "sweep of unknown experiment": ("sweeps/flip-probability/experiment", "plain-nanno", "results/sweeps/flip-probability.csv", ["plain-nanno", "plain-nano"]),
    "sweep of unknown task": ("sweeps/flip-probability/task", "pidocs", "results/sweeps/flip-probability.csv", ["pidocs"]),
    "missing local file": ("datasets/mine", {"source": {"type": "local", "path": "nowhere/*.txt"}}, "", ["datasets.mine", "nowhere"]),
    "unknown source": ("datasets/mine", {"source": {"type": "ftp"}}, "", ["datasets.mine.source.type", "ftp", "hub"]),
    "source without type": ("datasets/mine", {"source": {"files": []}}, "", ["datasets.mine.source.type"]),
    "url without checksum": ("datasets/mine", {"source": {"type": "url", "url": "https://example.org/a.txt"}}, "", ["datasets.mine.source", "sha256"]),
    "http url": ("datasets/mine", {"source": {"type": "url", "url": "http://example.org/a.txt", "sha256": "0" * 64}}, "", ["datasets.mine.source", "https"]),
    "zero steps": ("experiments/x", {"model": "nano", "recipe": {"pretrain": {"steps": 0}}}, "", ["experiments.x.recipe.pretrain", "0"]),
    "negative lr": ("experiments/x", {"model": "nano", "recipe": {"pretrain": {"lr": -1.0}}}, "", ["experiments.x.recipe.pretrain.lr", "-1.0"]),
    "two recipes": ("experiments/x", {"model": "nano", "recipe": {"pretrain": {}, "cram": {}}}, "", ["one recipe"]),
    "none without from": ("experiments/x", {"model": "nano", "recipe": "none"}, "", ["experiments.x.recipe", "from"]),
    "finetune from nothing": ("experiments/x", {"model": "nano", "recipe": {"finetune": {"steps": 1}}}, "", ["experiments.x.from", "finetune needs weights"]),
    "task for another family": ("models/b", {"bert": {"dim": 8, "layers": 1, "heads": 1, "ffn": 8}, "tokenizer": "pydocs", "dataset": "pydocs", "recipe": {"cram": {"steps": 1}}, "tasks": ["pydocs"]}, "results/plain-b/pydocs.json", ["tasks.pydocs", "cannot evaluate model b", "causal"]),
    "publishing off": ("seed", DELETE, "results/publish/plain-nano.json", ["publish", "owner/name"]),
    "table not rectangular": ("tables/robustness/cells", [["plain-nano"]], "", ["tables.robustness", "cells"]),
    "tokenizer of unknown dataset": ("tokenizers/pydocs/train/dataset", "pydoc", "", ["tokenizers.pydocs.train.dataset", "pydoc", "pydocs"]),
    "unused model's tokenizer": ("models/1.1b/tokenizer", "cosmo", "", ["models.1.1b.tokenizer", "cosmo", "cosmo2"]),
    "unused model's dataset": ("models/1.1b/dataset", "fineweb", "", ["models.1.1b.dataset", "fineweb", "fineweb-edu"]),
    "unused recipe": ("recipes/pretrian", {}, "", ["recipes.pretrian", "pretrain"]),
    "unused task's type": ("tasks/q", {"type": "lm-eval"}, "", ["tasks.q.type", "lm-eval", "lm_eval"]),
    "unused task's key": ("tasks/q", {"type": "lm_eval", "task": "x", "lmit": 3}, "", ["tasks.q.lmit", "limit"]),
    "sweep that nobody asked for": ("sweeps/optical-60m-rates/grid", {"recipe.finetune.lrr": [1.0]}, "", ["sweeps.optical-60m-rates", "lrr"]),
    "repository with ..": ("models/x", {"hub": {"repo": "../x"}}, "", ["models.x.hub.repo", "../x", "owner/name"]),
    "repository with ;": ("models/x", {"hub": {"repo": "a/b;rm"}}, "", ["models.x.hub.repo", "a/b;rm"]),
    "dataset repository with ..": ("datasets/x", {"source": {"type": "hub", "repo": "../x"}}, "", ["datasets.x.source.repo", "../x", "owner/name"]),
    "publish without owner": ("experiments/x", {"model": "nano", "publish": "x"}, "", ["experiments.x.publish", "owner/name"]),
    "list for a transform": ("experiments/x", {"model": "nano", "transform": ["bitflip"]}, "", ["experiments.x.transform", "bitflip", "give a name"]),
    "number for settings": ("experiments/x", {"model": "nano", "recipe": {"pretrain": 3}}, "", ["experiments.x.recipe", "3", "pretrain: {setting: value}"]),
    "two stores": ("experiments/x", {"model": "nano", "transform": "int2+ternary"}, "results/x/pydocs.json", ["experiments.x.transform", "int2+ternary", "one store", "q_proj"]),
    "split that leaves nothing": ("datasets/pydocs/split", {"valid": 0.7, "test": 0.7}, "", ["datasets.pydocs.split", "1.4"]),
    "infinite number": ("fault_seeds", float("inf"), "", ["fault_seeds"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_one_message(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, value, target, words = CASES[name]
    monkeypatch.chdir(tmp_path)
    config = edited(path, value) if not (value is DELETE and path == "seed") else copy.deepcopy(BASE)
    if name == "circle":
        config["experiments"]["y"] = {"from": "x"}
    Path("config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    with pytest.raises(UserError) as caught:
        plan = Plan.load()
        if target:
            plan.view(target)
    message = str(caught.value)
    for word in words:
        assert word in message, f"'{word}' is missing in:\n{message}"
    assert "fix:" in message
    assert len(message) < 2000


def test_key_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text("fault_seeds: 3\nfault_seeds: 4\n")
    with pytest.raises(UserError, match=r"(?s)config.yaml, line 2: key given twice.*fault_seeds.*keep one"):
        Plan.load()


def test_not_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text("a: [1\nb: 2\n")
    with pytest.raises(UserError, match=r"config\.yaml, line"):
        Plan.load()


def test_number_without_dot_is_a_number(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("a: 1e-4\nb: 5E3\nc: 1e\n")
    assert read_yaml(tmp_path / "c.yaml") == {"a": 1e-4, "b": 5000.0, "c": "1e"}


def test_through_snakemake_within_seconds(tmp_path: Path) -> None:
    """No traceback, no work, and fast: also when it is Snakemake that reads the configuration."""
    config = edited("models/nano/llama/heads", 3)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "snakemake",
            "-s",
            str(ROOT / "Snakefile"),
            "--cores",
            "1",
            "results/plain-nano/pydocs.json",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert done.returncode != 0
    assert "heads must divide dim" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) < 12
    assert not (tmp_path / "results" / "store").exists()
    assert seconds < 6  # of a processor; 3 s on an idle machine, mostly Snakemake's own start


def test_json_schema_is_current() -> None:
    """workflow/config.schema.json serves editors; `python -m pipeline_lib.config.schema` prints it."""
    from pipeline_lib.config.schema import Config

    assert json.loads((ROOT / "workflow" / "config.schema.json").read_text()) == Config.model_json_schema()
