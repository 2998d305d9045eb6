"""The literal targets of a fresh clone: bitflip-60m and its like, planned with the repository's own config.yaml."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline_lib.config.models import count_parameters
from pipeline_lib.config.nodes import Node
from pipeline_lib.config.plan import Plan
from tests.workflow.clone import ROOT, Clone, jobs
from tests.workflow.conftest import CONFIG

pytestmark = pytest.mark.slow

LITERAL = "snakemake -n --profile slurm results/bitflip-60m/wikitext.json"
STAGES = {"assets": 2, "dataset": 1, "tokenizer": 1, "tokens": 1, "train": 1, "convert": 1, "evaluate": 2, "result": 1}

# dim, layers, heads, kv heads, ffn; parameters without the input embedding, and all (vocabulary 49,152)
SIZES = {
    "60m": (384, 22, 6, 2, 1408, 63_226_752, 82_101_120),
    "200m": (768, 24, 12, 4, 2688, 224_170_752, 261_919_488),
    "400m": (960, 30, 15, 5, 3328, 408_511_680, 455_697_600),
    "600m": (1152, 32, 18, 6, 4096, 622_929_024, 679_552_128),
    "1.1b": (1536, 32, 24, 8, 5376, 1_069_647_360, 1_145_144_832),
}
# sequences a step over all GPUs, GPUs, steps at 22 tokens a parameter
BUDGETS = {
    "60m": (96, 2, 7_075),
    "200m": (64, 2, 37_627),
    "400m": (96, 8, 45_712),
    "600m": (128, 8, 52_279),
    "1.1b": (192, 8, 59_846),
}
TARGETS = [f"results/{transform}-{size}/wikitext.json" for size in SIZES for transform in ("plain", "bitflip")]


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """A fresh clone, with the repository's config.yaml."""
    clone = Clone.make(tmp_path_factory.mktemp("fresh") / "clone")
    shutil.copyfile(ROOT / "config.yaml", clone.root / "config.yaml")
    return clone


@pytest.fixture
def plan(fresh: Clone, monkeypatch: pytest.MonkeyPatch) -> Plan:
    monkeypatch.chdir(fresh.root)
    return Plan.load()


def command(line: str, clone: Clone) -> str:
    """Run a command line in a clone, as a user types it with the environment's commands on the PATH."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = clone.environment({"PATH": path})
    done = subprocess.run(line, shell=True, cwd=clone.root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def rules(output: str) -> dict[str, list[str]]:
    """{rule: the text of each of its jobs} in what a dry run prints."""
    found: dict[str, list[str]] = {}
    for name, text in re.findall(r"^(?:local)?rule (\w+):\n((?:    .*\n)+)", output, flags=re.M):
        found.setdefault(name, []).append(text)
    return found


@pytest.mark.parametrize("line", [LITERAL, LITERAL.replace("--profile slurm ", ""), LITERAL.replace("slurm", "local")])
def test_literal_target_lists_each_stage(line: str, fresh: Clone) -> None:
    output = command(line, fresh)
    assert jobs(output) == {**STAGES, "experiment_result": 1}
    listed = rules(output)
    assert "gpu=2" in listed["train"][0]
    assert all("gpu=1" in text for text in listed["evaluate"])
    if "slurm" in line:
        assert "nodes=1" in listed["train"][0]
        assert "runtime=240" in listed["train"][0]
        assert "runtime=60" in listed["evaluate"][0]


def test_every_size_plans_plain_and_with_flips(fresh: Clone) -> None:
    counted = jobs(command(f"snakemake -n --profile slurm {' '.join(TARGETS)}", fresh))
    assert counted["train"] == counted["convert"] == counted["result"] == counted["experiment_result"] == len(TARGETS)
    assert counted["evaluate"] == 5 * 1 + 5 * 2, "a plain experiment has one arm, one with flips has two"
    shared = (counted["tokens"], counted["tokenizer"], counted["assets"])
    assert shared == (4, 1, 2), "plain and flipped share data, and so do 400m and 600m: both fetch 64 GiB"


def test_plan_says_new_and_what_will_be_pinned(fresh: Clone, tmp_path: Path) -> None:
    said = fresh.run("plan", TARGETS[1])
    lines = [line.split(maxsplit=3) for line in said.splitlines() if line.startswith("to make")]
    why = [(stage, rest.partition("— ")[2]) for _, _, stage, rest in lines]
    assert {stage for stage, _ in why} == set(STAGES)
    assert len(why) == sum(STAGES.values())
    pinned_later = {"assets", "dataset"}
    for stage, text in why:
        assert text == ("new; main will be pinned at download" if stage in pinned_later else "new"), (stage, text)

    pinned = Clone.make(tmp_path / "pinned")
    shutil.copyfile(ROOT / "config.yaml", pinned.root / "config.yaml")
    keys = [
        "models/HuggingFaceTB/cosmo2-tokenizer@main",
        "datasets/HuggingFaceFW/fineweb-edu@main",
        "datasets/EleutherAI/wikitext_document_level@main",
    ]
    (pinned.root / "hub.lock.json").write_text(json.dumps(dict.fromkeys(keys, "c0ffee" * 6 + "c0ff")))
    assert "will be pinned" not in pinned.run("plan", TARGETS[1])


# -- what stands in the specs ------------------------------------------------------------------------------------------


def stage(target: str, name: str, plan: Plan) -> list[Node]:
    """The nodes of a stage behind a target."""
    found: dict[str, Node] = {}

    def visit(node: Node) -> None:
        found[node.path] = node
        for upstream in node.inputs.values():
            visit(upstream)

    visit(plan.view(target)[0])
    return [node for node in found.values() if node.stage == name]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("transform", ["plain", "bitflip"])
def test_dimensions_budget_and_recipe(transform: str, size: str, plan: Plan) -> None:
    [train] = stage(f"results/{transform}-{size}/wikitext.json", "train", plan)
    model, recipe = train.settings["model"], train.settings["recipe"]
    *dimensions, without_embedding, total = SIZES[size]
    assert [model[key] for key in ("dim", "layers", "heads", "kv_heads", "ffn")] == dimensions
    assert (model["family"], model["vocab"], model["max_seq_len"], model["rope_theta"]) == ("llama", 49_152, 2048, 1e4)
    assert count_parameters(model) == (total, without_embedding)

    global_batch, gpus, steps = BUDGETS[size]
    assert (recipe["type"], recipe["global_batch"], recipe["seq_len"]) == ("pretrain", global_batch, 2048)
    assert recipe["steps"] == steps == math.ceil(22 * without_embedding / (global_batch * 2048))
    assert recipe["warmup_steps"] == steps // 5
    assert (recipe["lr"], recipe["weight_decay"], recipe["max_norm"]) == (1e-4, 0.1, 1.0)
    assert (recipe["betas"], recipe["decay"], recipe["min_lr_factor"]) == ([0.9, 0.95], "linear", 0.0)
    assert recipe["precision"] == "bf16"
    assert train.execution["gpus"] == gpus
    assert global_batch == train.execution["micro_batch"] * gpus, "no accumulation on the GPUs it was published for"


def test_budget_counts_every_rank(plan: Plan, fresh: Clone) -> None:
    """More GPUs mean the same steps of the same global batch: the same fingerprint."""
    target = "results/bitflip-60m/wikitext.json"
    wider = Plan.load("config.yaml", {"models": {"60m": {"run": {"gpus": 8, "micro_batch": 3}}}})
    [before], [after] = stage(target, "train", plan), stage(target, "train", wider)
    assert (before.execution["gpus"], after.execution["gpus"]) == (2, 8)
    assert before.fingerprint == after.fingerprint


def test_data_and_tokenizer(plan: Plan) -> None:
    for size, (_, _, _, _, _, without_embedding, _) in SIZES.items():
        target = f"results/bitflip-{size}/wikitext.json"
        [dataset] = stage(target, "dataset", plan)
        source = dataset.settings["source"]
        assert (source["type"], source["repo"], source["config"]) == (
            "hub",
            "HuggingFaceFW/fineweb-edu",
            "sample-100BT",
        )
        assert dataset.settings["max_bytes"] >= 4.5 * 22 * without_embedding, "English has about 4.5 bytes a token"
        [tokenizer] = stage(target, "tokenizer", plan)
        assert tokenizer.settings["hub"]["repo"] == "HuggingFaceTB/cosmo2-tokenizer"


@pytest.mark.parametrize("size", SIZES)
def test_flips_are_the_published_ones_and_alike_in_training_and_evaluation(size: str, plan: Plan) -> None:
    target = f"results/bitflip-{size}/wikitext.json"
    [train] = stage(target, "train", plan)
    arms = [node.settings["transform"] for node in stage(target, "evaluate", plan)]
    assert sorted(map(len, arms)) == [0, 1]
    [flips] = train.settings["transform"]
    assert [flips] in arms
    for operand, threshold in (("weight", 1.25), ("input", 30.0)):
        assert flips[operand]["p"] == 2.0**-16
        assert flips[operand]["zero_out"] == threshold
        assert flips[operand]["p_exp"] is flips[operand]["p_frac"] is None
    assert all(node.settings["dtype"] == "bfloat16" for node in stage(target, "evaluate", plan))


def test_the_head_is_not_flipped(plan: Plan) -> None:
    """In neither model: torchtitan's, which is trained, and that of transformers, which is evaluated."""
    import torch

    from pipeline_lib.models import llama
    from pipeline_lib.models.naming import canonical_titan
    from pipeline_lib.training.titan.device import prepare
    from pipeline_lib.transforms.apply import apply

    prepare()
    from pipeline_lib.training.titan.model import TitanLlama, model_args

    [train] = stage("results/bitflip-60m/wikitext.json", "train", plan)
    model, transform = train.settings["model"], train.settings["transform"]
    with torch.device("meta"):
        trained, evaluated = TitanLlama(model_args(model, seed=0)), llama.build(model)
    in_training = apply(trained, transform, seed=0, canonical=canonical_titan).report["layers"]
    in_evaluation = apply(evaluated, transform, seed=0).report["layers"]
    parts = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert len(in_training) == 22 * len(parts)
    assert {name.rpartition(".")[2] for name in in_training} == set(parts)
    assert sorted(in_training) == sorted(in_evaluation)


# -- profiles ----------------------------------------------------------------------------------------------------------


def profile(folder: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / folder / "profile.yaml").read_text())


def test_the_default_profile_overrides_no_other() -> None:
    """Snakemake lays profiles/default over `--profile`, key by key."""
    default = profile("profiles/default")
    assert profile("slurm")["executor"] == "slurm"
    assert not {"executor", "jobs", "default-resources", "set-resources", "retries", "latency-wait"} & set(default)
    for name in ("slurm", "local"):
        differing = {key for key, value in profile(name).items() if key in default and default[key] != value}
        assert not differing, f"{name}: {differing} have no effect"
        assert "rerun-incomplete" not in profile(name)
    assert "rerun-incomplete" not in default
    assert default["nolock"] is default["ignore-incomplete"] is True


def test_a_job_that_was_killed_for_memory_gets_more_of_it() -> None:
    """From the rule, which counts the kills; what no rule says comes from the profile, which counts the attempts."""
    asked = profile("slurm")["default-resources"]["mem_mb"]
    assert [eval(asked, {"attempt": attempt}) for attempt in (1, 2, 3)] == [8000, 16000, 24000]
    for path in sorted((ROOT / "rules").glob("*.smk")):
        for value in re.findall(r"mem_mb=(\w+)", path.read_text()):
            assert value == "memory", path.name


SBATCH = """#!/bin/sh
printf '%s\\n' "$*" >> "{log}"
wc -l < "{log}"
"""


@pytest.mark.parametrize("nodes", [1, 2])
def test_slurm_profile_submits_with_what_the_config_asks_for(nodes: int, copied: Clone, tmp_path: Path) -> None:
    """To a stand-in of Slurm's commands: executor, partition, GPUs, and threads not cut to this machine's cores."""
    log, commands = tmp_path / "sbatch.log", tmp_path / "bin"
    commands.mkdir()
    for name in ("squeue", "scancel", "sacct", "sacctmgr", "scontrol", "sinfo"):
        (commands / name).write_text("#!/bin/sh\n")
    (commands / "sbatch").write_text(SBATCH.format(log=log))
    for path in commands.iterdir():
        path.chmod(0o755)
    changed = copy.deepcopy(CONFIG)
    changed["models"]["tiny"]["run"].update(
        {"gpus": 3, "nodes": nodes, "threads": 301, "mem_mb": 1234, "runtime_min": 77}
    )
    copied.write_config(changed)
    for name in ("train", "convert", "evaluate", "result"):
        shutil.rmtree(copied.root / "results" / "store" / name)
    target = "results/plain-tiny/words.json"
    (copied.root / target).unlink()
    environment = copied.environment({"PATH": f"{commands}{os.pathsep}{os.environ['PATH']}"})
    arguments = [sys.executable, "-m", "snakemake", "--profile", "slurm", target]
    with open(tmp_path / "output", "w") as output:
        process = subprocess.Popen(
            arguments, cwd=copied.root, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 120
        while not log.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(0.5)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert log.exists(), (tmp_path / "output").read_text()[-3000:]
    [call] = log.read_text().splitlines()
    before_wrapped, wrapped = call.split("--wrap=")
    words = before_wrapped.split()
    assert "rule_train_wildcards" in before_wrapped
    assert words[words.index("-p") + 1] == "gpu"
    assert words[words.index("-t") + 1] == "77"
    assert words[words.index("--mem") + 1] == "1234"
    assert {f"--gpus={3 * nodes}", f"--nodes={nodes}", "--cpus-per-task=301", "--requeue"} <= set(words)
    assert "--ntasks-per-gpu" not in before_wrapped, "or Slurm would start the script once a GPU"
    several = {"--gpus-per-node=3", "--ntasks=2"}  # one task a node: torchrun starts the ranks
    assert several & set(words) == (several if nodes == 2 else set())
    assert "--cores 'all'" in wrapped
    assert "slurm-jobstep" in wrapped
