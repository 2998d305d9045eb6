"""Whole targets through Slurm: the demo's plain half, a training over two nodes, and what is refused or fails."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
import yaml

from pipeline_lib.artifacts.files import read_json
from tests.cluster import faults
from tests.cluster.minislurm import MiniSlurm, wait
from tests.cluster.run import CONFIG, RESULT, Run
from tests.workflow.clone import ROOT, Clone


def test_the_demos_plain_half(slurm: MiniSlurm, tmp_path: Path) -> None:
    config = yaml.safe_load((ROOT / "config.yaml").read_text())
    # One thread, as configured: two would wait for each other where cores are shared.
    config["models"]["nano"]["run"].update(eval_mem_mb=3000)
    run = Run(slurm, tmp_path / "clone", "cpu", config)
    target = "results/plain-nano/pydocs.json"
    run.start(target)
    said = run.finish(900)
    result = read_json(run.clone.root / target)["result"]
    assert result["clean"]["metrics"]["byte_perplexity"]["mean"] < 6
    submitted = re.findall(r"SLURM jobid \d+ \(log: \S*/logs/slurm/(\w+)/", said)
    assert sorted(submitted) == ["group_data_tokenizer_tokens", "rule_convert", "rule_evaluate", "rule_train"]
    assert "localrule dataset" in said, "compute nodes need no internet"
    comments = slurm.run("squeue", "-h", "--states=all", "-o", "%Z|%k").splitlines()
    ours = [line.split("|")[1] for line in comments if line.startswith(f"{run.clone.root}|")]
    assert any(c.startswith("rule_train_wildcards_pretrain-plain-") and "experiment plain-nano" in c for c in ours)


@pytest.mark.xdist_group("pair")  # one after the other: both take the same nodes
@pytest.mark.parametrize("fault", ["time limit", "preempted"])
def test_two_nodes_of_two_processes(slurm: MiniSlurm, undisturbed: Clone, tmp_path: Path, fault: str) -> None:
    """One torchrun a node, FSDP over gloo: the same training but for the order of sums, in two slots."""
    config = copy.deepcopy(CONFIG)
    config["models"]["tiny"]["recipe"]["pretrain"]["steps"] = 40
    config["models"]["tiny"]["run"].update(nodes=2, cpu_processes=2, threads=2, runtime_min=2)
    run = Run(slurm, tmp_path / "clone", "pair", config, undisturbed)
    run.start()
    run.hold(5)
    job = run.job()
    faults.FAULTS[fault](run)
    slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=20")  # no further slot
    said = run.finish()
    training = (run.clone.root / run.target).parent
    assert read_json(training / "train.json")["provenance"]["processes"] == 4
    assert run.jobs_submitted() == [job], f"it should have requeued itself\n{said}\n{run.log()}"
    assert slurm.field(job, "NumNodes") == "2"
    [resumed], [stopped] = run.resumed_from(), re.findall(r"stopped after step (\d+)", run.log())
    assert resumed == int(stopped), "no step is lost"
    [alone] = (undisturbed.root / "results" / "store" / "train").iterdir()
    lines = [(path / "log" / "metrics.jsonl").read_text().splitlines() for path in (training, alone)]
    losses = [{row["step"]: row["loss"] for row in map(json.loads, own)} for own in lines]
    assert list(losses[0]) == list(range(1, 41)), "each step once: the script did not run twice"
    # The schedules differ (40 steps or 900), so only the first steps are the same training.
    assert abs(losses[0][1] - losses[1][1]) < 1e-4


def test_what_slurm_rejects_is_told_and_the_rest_goes_on(slurm: MiniSlurm, undisturbed: Clone, tmp_path: Path) -> None:
    config = copy.deepcopy(CONFIG)
    config["experiments"]["huge"] = {"model": "tiny", "seed": 5, "transform": "plain", "run": {"mem_mb": 99_000_000}}
    config["models"]["tiny"]["recipe"]["pretrain"]["steps"] = 4
    run = Run(slurm, tmp_path / "clone", "cpu10", config, undisturbed)
    run.start("--retries", "0", "--", "results/huge/words.json", RESULT)
    said = run.finish(ok=False)
    assert "Memory specification can not be satisfied" in said or "Requested node configuration" in said
    assert (run.clone.root / RESULT).exists(), "the other branch goes on"
    [told] = [line for line in said.splitlines() if line.startswith("errata: ") and "was not begun" in line]
    assert told.startswith("errata: train pretrain-plain-llama"), "the stage that Slurm refused, and none that needs it"
    assert "fix:     where Slurm refused it" in said


def test_a_failing_stage_names_job_log_and_fix(slurm: MiniSlurm, undisturbed: Clone, tmp_path: Path) -> None:
    config = copy.deepcopy(CONFIG)
    config["models"]["tiny"]["run"].update(micro_batch=3)  # does not divide the global batch
    run = Run(slurm, tmp_path / "clone", "cpu10", config, undisturbed)
    run.start("--retries", "0", "--", run.target)
    said = run.finish(ok=False)
    [job] = run.jobs_submitted()
    told = said[said.index("errata: train pretrain-plain-llama") :]
    for word in (f"refused in Slurm job {job}", "micro_batch", "results/logs/train/pretrain-plain-llama", "fix:"):
        assert word in told, told


def test_a_sweep_of_100_jobs_is_queued_at_once_and_cancelled_at_once(
    slurm: MiniSlurm, undisturbed: Clone, tmp_path: Path
) -> None:
    """No job is held back until another has ended, and Ctrl-C leaves none behind."""
    config = copy.deepcopy(CONFIG)
    config["sweeps"] = {"seeds": {"experiment": "plain-tiny", "task": "words", "grid": {"seed": list(range(100))}}}
    run = Run(slurm, tmp_path / "clone", "cpu11", config, undisturbed)
    slurm.run("scontrol", "update", "PartitionName=cpu11", "State=DOWN")  # takes jobs, and lets them wait
    try:
        run.start("results/sweeps/seeds.csv")
        assert wait(lambda: len(run.jobs_submitted()) == 100 or run.process_ended(), 200), run.said()[-3000:]
        jobs = run.jobs_submitted()
        assert {run.state(job) for job in (jobs[0], jobs[-1])} == {"PENDING"}
        assert run.process is not None
        run.process.send_signal(2)
        run.process.wait(120)
        assert wait(lambda: not set(jobs) & set(slurm.jobs()), 60)
    finally:
        slurm.run("scontrol", "update", "PartitionName=cpu11", "State=UP")
