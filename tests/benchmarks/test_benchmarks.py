"""The benchmarks run on tiny settings and compare like with like; the page is what their JSON gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks import nano_training, planning, sweep, ternary_cpu, ternary_gpu
from benchmarks.report import FOLDER, page
from pipeline_lib.artifacts.files import write_json
from pipeline_lib.config.plan import Plan

NAMES = {
    "bitflip_cpu", "bitflip_gpu", "bitflip_step", "int2_block", "int2_cpu", "int2_gpu", "nano_training", "optical_gpu", "optical_step", "planning", "startup", "sweep", "ternary_cpu", "ternary_gpu"
}  # fmt: skip


def test_page_is_what_the_committed_json_gives() -> None:
    assert {path.stem for path in FOLDER.glob("*.json")} <= NAMES
    assert (FOLDER / "README.md").read_text() == page()


def speeds(**tokens_per_s: list[float]) -> dict[str, list[dict[str, float]]]:
    return {name: [{"tokens_per_s": speed, "loss": 2.0} for speed in found] for name, found in tokens_per_s.items()}


def test_ratios_compare_runs_of_the_same_round() -> None:
    runs = speeds(errata=[100, 220, 90], rival=[50, 200, 100])
    [ours, rival] = nano_training.summary(runs)
    assert ours["errata's ratio to it"] == 1.0
    assert rival["errata's ratio to it"] == 1.1
    assert rival["ratio range"] == "0.90-2.00"
    assert rival["tokens/s"] == 100


def test_trainings_that_end_apart_are_no_contest() -> None:
    runs = speeds(errata=[100], rival=[50])
    nano_training.check_same_work(runs)
    runs["rival"][0]["loss"] = 2.01
    with pytest.raises(RuntimeError, match="not the same work"):
        nano_training.check_same_work(runs)


@pytest.mark.slow
def test_contestants_do_the_same_training(tmp_path: Path) -> None:
    stage: dict[str, Any] = nano_training.settings(4)
    stage["model"] |= {"dim": 32, "layers": 1, "heads": 2, "kv_heads": 1, "ffn": 32, "vocab": 64, "max_seq_len": 16}
    stage["recipe"] |= {"seq_len": 16, "global_batch": 4, "warmup_steps": 1}
    nano_training.make_tokens(tmp_path / "tokens", 64, 2000)
    write_json(tmp_path / "contest.json", {"settings": stage, "skip": 2, "log_every": 2})
    runs = {name: [nano_training.contest(name, tmp_path, 1)] for name in nano_training.CONTESTANTS}
    nano_training.check_same_work(runs)
    assert all(run["tokens_per_s"] > 0 for [run] in runs.values())


def test_ternary_products_are_compared_on_the_same_work() -> None:
    forward, both = ternary_cpu.measure(3, 23, 17, 2)
    assert (forward["pass"], both["pass"]) == ("forward", "forward, backward")
    assert forward["rows of x"] == both["rows of x"] == 3


def test_the_gpu_benchmark_refuses_to_run_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["ternary_gpu"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="there is no GPU here"):
        ternary_gpu.main()


@pytest.mark.slow
def test_planning_is_compared_on_the_same_dag(tmp_path: Path) -> None:
    row = planning.measure(2, 1, tmp_path)
    assert row["jobs"] == 3 + 3 * 2 + 2  # data, the trainings, the sweep and its copy
    assert 0 < row["resolver_s"] < row["plan_s"]


def test_sweep_has_25_cells_of_one_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(sweep.config(2, 5, [1], 1)))
    node, _ = Plan.load(str(tmp_path / "config.yaml")).view("results/sweeps/pydocs-1.csv")
    cells = node.inputs.values()
    assert len({cell.id for cell in cells}) == 25
    assert len({cell.inputs["checkpoint"].id for cell in cells}) == 1
    assert all(cell.settings["fault_seeds"] == [0] for cell in cells)
