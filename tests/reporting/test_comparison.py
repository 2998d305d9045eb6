"""The table over arms: verdicts, power, work; planned from config.yaml, made by the stage."""

from __future__ import annotations

import copy
import csv
import io
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from pipeline_lib.artifacts.files import write_bytes, write_json
from pipeline_lib.artifacts.job import Job
from pipeline_lib.config.comparisons import outline
from pipeline_lib.config.errors import UserError
from pipeline_lib.config.plan import Plan
from pipeline_lib.config.registry import METHODS, RECIPES, TASK_TYPES
from pipeline_lib.reporting import switches
from pipeline_lib.reporting.budget_curves import curve, panels, unit_of
from pipeline_lib.reporting.comparison import Comparison, judge, measured
from pipeline_lib.reporting.verdicts import detectable, power_of_difference
from pipeline_lib.stages import table
from tests.workflow.clone import TINY, write_words

SETTINGS: dict[str, Any] = {
    "arms": ["baseline", "shifted", "alike", "broken"],
    "columns": ["short"],
    "seeds": [3, 4, 5],
    "measures": [{"task": "validate", "metric": "loss", "delta": 0.1}],
    "level": 0.05,
}
VALUES: dict[str, list[Any]] = {
    "baseline": [5.0, 5.2, 5.1],
    "shifted": [4.5, 4.72, 4.6],
    "alike": [5.01, 5.2, 5.1],
    "broken": [5.0, "nan", 5.0],
}


NOT_SWITCHES = {"budget"}
"""Settings whose description speaks of what was published, and which choose no behaviour."""


def result(value: Any, **conditions: Any) -> dict[str, Any]:
    said = {"higher_is_better": {"": {"loss": False}}, **conditions}
    figures = {"mean": value, "stderr": None, "n": 1, "values": [value], "sampling_stderr": 0.01}
    return {"clean": {"task": {"type": "validate"}, "conditions": said, "metrics": {"loss": figures}}}


def results() -> dict[str, Any]:
    return {f"0.{a}.{s}.0": result(VALUES[arm][s]) for a, arm in enumerate(SETTINGS["arms"]) for s in range(3)}


def trainings() -> dict[str, Any]:
    rows = [
        {"kind": "train", "layers": 4, "sequences": 32, "charged": True},
        {"kind": "train", "layers": 2, "sequences": 16, "charged": True},
        {"kind": "forward", "layers": 4, "sequences": 8, "charged": False},
    ]
    return {f"0.{a}.{s}": {"steps": 10 * (a + 1), "rst_hours": s, "work": rows} for a in range(4) for s in range(3)}


def compared(results: dict[str, Any], trainings: dict[str, Any]) -> Comparison:
    return judge(SETTINGS, *measured(SETTINGS, results, trainings))


def test_verdicts_power_and_work() -> None:
    made = compared(results(), trainings())
    lines = {line["arm"]: line for line in csv.DictReader(io.StringIO(made.csv()))}
    assert {arm: line["verdict"] for arm, line in lines.items()} == {
        "baseline": "baseline", "shifted": "better", "alike": "equal within δ", "broken": "worse"
    }  # fmt: skip
    assert float(lines["shifted"]["difference"]) == pytest.approx((-0.5 - 0.48 - 0.5) / 3)
    assert [float(lines["shifted"][f"seed_{seed}"]) for seed in (3, 4, 5)] == VALUES["shifted"]
    assert (lines["broken"]["mean"], lines["broken"]["difference"]) == ("", "")
    spread = ((0.02**2 / 3 + 0.01**2 / 3) / 2) ** 0.5
    assert float(lines["alike"]["power_of_delta"]) == pytest.approx(power_of_difference(0.1, spread, 3))
    assert float(lines["alike"]["detectable"]) == pytest.approx(detectable(spread, 3))
    assert (float(lines["alike"]["steps"]), float(lines["alike"]["rst_hours"])) == (30.0, 1.0)
    assert (float(lines["alike"]["sequences.train"]), float(lines["alike"]["layer_passes.train"])) == (48.0, 160.0)
    assert float(lines["alike"]["sequences.forward.free"]) == 8.0
    page = made.markdown()
    assert "## validate: loss, short" in page
    assert "| broken | nan | nan | nan … nan | worse |" in page
    assert "80 %" in page


def test_arms_scored_on_other_examples_are_refused() -> None:
    found = {**results(), "0.2.1.0": result(5.0, text="another")}
    with pytest.raises(UserError, match=r"not scored on the same examples(.|\n)*alike"):
        compared(found, {})
    silent = {key: result(5.0, higher_is_better={}) for key in results()}
    with pytest.raises(UserError, match="whether more of this metric is better"):
        compared(silent, {})


def test_the_stage_writes_both_files(tmp_path: Path) -> None:
    inputs = {}
    for key, value in results().items():
        write_json(tmp_path / key / "result.json", {"result": value})
        inputs[f"result:{key}"] = tmp_path / key
    for key, value in trainings().items():
        write_json(tmp_path / key / "train.json", {"result": value})
        lines = [{"loss": 5.0, "spent": 0.1}, {"loss": 4.0, "spent": 0.2, "valid_loss": 4.5}]
        write_bytes(tmp_path / key / "log" / "metrics.jsonl", "".join(f"{json.dumps(x)}\n" for x in lines).encode())
        inputs[f"train:{key}"] = tmp_path / key
    table.run(Job("table", "t", "0" * 64, SETTINGS, inputs, tmp_path / "work", tmp_path / "out"))
    made = compared(results(), trainings())
    assert (tmp_path / "out" / "table.csv").read_text() == made.csv()
    assert (tmp_path / "out" / "table.md").read_text() == made.markdown()
    assert "<svg" in (tmp_path / "out" / "table.svg").read_text()


def test_a_panel_for_each_column() -> None:
    points = [(0.0, 5.0), (1.0, 4.0)]
    drawn = panels(
        {f"{n} h": {"baseline": points, "other": [] if n == 2 else points} for n in range(4)},
        unit_of([{"rst_hours": 1.0}]),
        "x",
    )
    words = list(ElementTree.fromstring(drawn.svg).itertext())
    assert [sum(f"{n} h" in word for word in words) for n in range(5)] == [1, 1, 1, 1, 0]
    assert [sum(word.strip() == arm for word in words) for arm in ("baseline", "other")] == [1, 1], "one legend"
    assert any("reference hours" in word for word in words)
    assert panels({"only": {"baseline": []}}, unit_of([{}]), "y").svg, "nothing was measured"


def test_which_behaviour_ran() -> None:
    recipe = {"type": "cram", "methods": [{"type": "sophia-g", "hessian": "published", "rho": 0.04}, {"type": "lion"}]}
    assert switches.of_recipe(recipe) == {"decay_norms": False, "sophia-g: hessian": "published"}
    assert switches.of_task({"type": "glue", "epoch": "last", "lr": 1}) == {"epoch": "last"}
    found = {**switches.of_recipe({**recipe, "decay_norms": True}), "epoch": "last", "rho-loss: masks": "matched"}
    assert [switches.as_published(name, value) for name, value in found.items()] == [True, True, False, False]


def test_every_switch_is_a_setting() -> None:
    """And whatever may be `published` in a recipe cram, its methods and the tasks of comparisons is a switch."""
    fields: dict[str, Any] = dict(RECIPES.load("cram").Settings.model_fields)
    for module in [METHODS.load(name) for name in METHODS.names()] + [TASK_TYPES.load(n) for n in TASK_TYPES.names()]:
        fields |= {name: field for name, field in module.Settings.model_fields.items() if "published" in str(field)}
    assert switches.PUBLISHED.keys() == {
        name for name, field in fields.items() if "published" in str(field) and name not in NOT_SWITCHES
    }


def test_curves_are_means_over_seeds() -> None:
    one = [
        {"loss": 5.0, "spent": 1.0, "valid_loss": 6.0},
        {"loss": 4.0, "spent": 2.0},
        {"spent": 3.0, "valid_loss": 4.0},
    ]
    other = [{"spent": 1.5, "valid_loss": 7.0}]
    assert curve([one]) == [(1.0, 6.0), (3.0, 4.0)]
    assert curve([one, other]) == [(1.25, 6.5)], "as long as the shortest"
    assert curve([[{"loss": 5.0, "tokens": 8}]]) == [(8.0, 5.0)]


# -- planning ----------------------------------------------------------------------------------------------------------

COMPARED: dict[str, Any] = {
    "experiment": "plain-tiny",
    "arms": {"as it is": {}, "slow": {"recipe": {"pretrain": {"lr": 1e-4}}}},
    "columns": {"short": {"recipe": {"pretrain": {"steps": 2}}}, "long": {"recipe": {"pretrain": {"steps": 4}}}},
    "seeds": [0, 1],
    "measures": [{"task": "words", "metric": "byte_perplexity", "delta": 0.5}],
}


def plan(folder: Path, monkeypatch: pytest.MonkeyPatch, **other: Any) -> Plan:
    monkeypatch.chdir(folder)
    write_words(folder / "data")
    config = copy.deepcopy(TINY)
    config["comparisons"] = {"methods": {**COMPARED, **other}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return Plan.load()


def test_a_comparison_is_planned_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = plan(tmp_path, monkeypatch, on_request=True)
    assert not [target for target in made.targets() if "methods" in target]
    assert not [role for role in made.report().inputs if "methods" in role]
    node, file = made.view("results/tables/methods.csv")
    assert (file, node.settings["arms"], node.settings["columns"]) == (
        "table.csv",
        ["as it is", "slow"],
        ["short", "long"],
    )
    trains = {role: upstream for role, upstream in node.inputs.items() if role.startswith("train:")}
    assert len(trains) == len({upstream.path for upstream in trains.values()}) == 8
    assert len(node.inputs) == 16
    said = outline("methods", made.config.comparisons["methods"])
    assert said == (
        "methods: 2 arms (as it is, slow) × 2 columns (short; long) × 2 seeds = 8 cells, each measured by words"
    )
    recipe = trains["train:1.1.1"].settings["recipe"]
    assert (recipe["steps"], recipe["lr"], trains["train:1.1.1"].settings["seed"]) == (4, 1e-4, 1)
    own = made.resolver.train(made.resolver.experiments.get("plain-tiny")).settings["recipe"]
    assert recipe["seq_len"] == own["seq_len"], "what it says nothing about is the experiment's"


def test_else_it_is_a_part_of_all_and_of_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = plan(tmp_path, monkeypatch)
    assert {"results/tables/methods.csv", "results/tables/methods.md"} <= set(made.targets())
    assert made.report().inputs["comparison:methods"].id == made.view("results/tables/methods.svg")[0].id


def test_an_arm_may_depend_on_the_dataset_of_its_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Irreducible losses are those of a model for each dataset; a task without a dataset takes the experiment's."""
    small = {"steps": 2, "global_batch": 4, "seq_len": 16}
    config = copy.deepcopy(TINY)
    words = {**config["datasets"]["words"], "split": {"valid": 0.2, "test": 0.2, "holdout": 0.2}}
    config["datasets"] |= {"words": words, "others": {**words, "seed": 1}}
    for name in ("words", "others"):
        judge = {"model": "tiny", "dataset": name, "recipe": {"cram": {**small, "split": "holdout"}}}
        config["experiments"][f"judge-{name}"] = judge
    config["experiments"]["base"] = {"model": "tiny", "recipe": {"cram": small}}
    config["tasks"] = {**config["tasks"], "held-out": {"type": "validate", "sequences": 2, "seq_len": 16}}
    rho = {"losses": "judge-{dataset}", "recipe": {"cram": {"methods": [{"rho-loss": {"mega_batch": 8}}]}}}
    config["comparisons"] = {
        "methods": {
            **COMPARED,
            "experiment": "base",
            "arms": {"baseline": {}, "rho": rho},
            "columns": {"words": {}, "others": {"dataset": "others"}},
            "measures": [{"task": "held-out", "metric": "loss", "delta": 0.5}],
        }
    }
    monkeypatch.chdir(tmp_path)
    write_words(tmp_path / "data")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    made = Plan.load()
    inputs = made.view("results/tables/methods.csv")[0].inputs
    for column, name in enumerate(("words", "others")):
        losses = inputs[f"train:{column}.1.0"].inputs["losses"]
        judge = made.resolver.train(made.resolver.experiments.get(f"judge-{name}"))
        assert losses.inputs["model"].inputs["train"].id == judge.id
        scored = inputs[f"result:{column}.1.0.0"].inputs["clean"]
        assert scored.inputs["dataset"].id == made.resolver.dataset(name).id


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"arms": {"a": {}, "b": {"resipe": {}}}}, ["unknown key", "comparisons.methods.arms.b", "recipe"]),
        ({"columns": {"c": {"recipe": {"pretrain": {"stebs": 1}}}}}, ["stebs"]),
        ({"experiment": "plain-tinny"}, ["unknown experiment", "comparisons.methods.experiment"]),
        (
            {"measures": [{"task": "wurds", "metric": "x", "delta": 1}]},
            ["unknown task", "comparisons.methods.measures"],
        ),
    ],
)
def test_mistakes_are_told_by_their_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(UserError) as error:
        plan(tmp_path, monkeypatch, **other).view("results/tables/methods.csv")
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("other", [{"seeds": [1, 1]}, {"seeds": [1]}, {"arms": {"a": {}}}])
def test_too_little_to_compare_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: Any) -> None:
    with pytest.raises(UserError, match=f"comparisons.methods.{next(iter(other))}|different ones"):
        plan(tmp_path, monkeypatch, **other)
