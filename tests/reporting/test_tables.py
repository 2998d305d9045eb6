"""Numbers, tables, sweeps: right, the same for the same input, and read back as they were."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline_lib.artifacts.files import read_json, write_json
from pipeline_lib.artifacts.job import Job
from pipeline_lib.config.errors import UserError
from pipeline_lib.reporting.numbers import Measured, label, main_metric, number, plus_minus
from pipeline_lib.reporting.sweeps import make_sweep, read_sweep
from pipeline_lib.reporting.tables import make_grid, read_grid
from pipeline_lib.stages import sweep, table
from tests.reporting.conftest import BITFLIP, GRID, arm


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (12.3456, "12.35"),
        (1234.5678, "1,235"),
        (0.05, "0.05000"),
        (1.234e8, "1.23e+08"),
        (-3.5e-5, "−3.50e-05"),
        (0.0, "0"),
        (-2.5, "−2.500"),
        (math.inf, "∞"),
        (-math.inf, "−∞"),
        (math.nan, "nan"),
    ],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("mean", "stderr", "text"),
    [
        (12.34567, 0.0213, "12.346 ± 0.021"),
        (2952.9, 49.6, "2,953 ± 50"),
        (412.7, None, "412.7"),
        (412.7, 0.0, "412.7 ± 0"),
        (math.inf, None, "∞"),
        (3.2e9, 4.1e8, "3.20e+09 ± 4.1e+08"),
    ],
)
def test_errors_set_the_digits_of_the_mean(mean: float, stderr: float | None, text: str) -> None:
    assert plus_minus(mean, stderr) == text


def test_values_of_settings_are_short() -> None:
    shown = [label(value) for value in (2.0**-10, 0.5, 1e-3, 0.0, None, True, "a", 7)]
    assert shown == ["2⁻¹⁰", "0.5", "0.001", "0", "none", "yes", "a", "7"]


def test_the_main_metric() -> None:
    assert main_metric(["byte_perplexity", "word_perplexity"]) == "word_perplexity"
    assert main_metric(["byte_perplexity", "word_perplexity"], ["acc", "byte_perplexity"]) == "byte_perplexity"
    assert main_metric(["zeta", "alpha"]) == "alpha"


def test_the_samples_own_error_is_shown_where_there_are_no_seeds() -> None:
    figures = {"mean": 0.5, "stderr": None, "n": 1, "values": [0.5], "sampling_stderr": 0.02}
    assert Measured.of(figures) == Measured(0.5, 0.02, 1, True)
    assert Measured.of({**figures, "n": 5, "stderr": 0.1}) == Measured(0.5, 0.1, 5)


def results() -> dict[str, dict[str, Any]]:
    return {
        "plain-nano": {"clean": arm([412.75], [], [])},
        "plain-flipped": {"clean": arm([412.75], [], []), "transformed": arm([2950.0, 2811.5], [BITFLIP], [0, 1])},
        "bitflip-clean": {"clean": arm([455.0], [], [])},
        "bitflip-nano": {"clean": arm([455.0], [], []), "transformed": arm([600.0, 610.0], [BITFLIP], [0, 1])},
    }


def test_a_two_by_two_table(tmp_path: Path) -> None:
    inputs = {}
    for name, result in results().items():
        inputs[name] = tmp_path / name
        write_json(inputs[name] / "result.json", {"result": result})
    table.run(Job("table", "t", "f" * 64, GRID, inputs, tmp_path / "work", tmp_path / "out"))
    markdown = (tmp_path / "out" / "table.md").read_text()
    assert markdown.splitlines() == [
        "| word_perplexity | evaluated without flips | evaluated with flips |",
        "| --- | ---: | ---: |",
        "| trained without flips | 412.8 | 2,881 ± 69 (n=2) |",
        "| trained with flips | 455.0 | 605.0 ± 5.0 (n=2) |",
    ]
    text = (tmp_path / "out" / "table.csv").read_text()
    lines = list(csv.DictReader(text.splitlines()))
    assert [line["mean"] for line in lines] == ["412.75", "2880.75", "455.0", "605.0"]
    assert lines[0]["stderr"] == ""
    assert float(lines[3]["stderr"]) == pytest.approx(5.0)
    assert read_grid(text) == make_grid(GRID, results())


def test_cells_of_different_tasks_are_refused() -> None:
    changed = results()
    changed["plain-nano"]["clean"]["task"] = {"type": "lm_eval", "task": "wikitext"}
    with pytest.raises(UserError, match="different tasks"):
        make_grid(GRID, changed)


def test_an_unknown_metric_names_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"(?s)word_perplexity.*did you mean"):
        make_grid({**GRID, "metric": "word_perplexty"}, results())


def test_a_sweep_is_collected_in_the_order_of_its_rows(tmp_path: Path) -> None:
    values = [0.25, None, [1, 2], "3", True]
    inputs = {}
    for index in range(len(values)):
        inputs[f"{index:05}"] = tmp_path / str(index)
        result = arm([10.0 + index, 12.0 + index], [BITFLIP], [0, 1])
        write_json(tmp_path / str(index) / "result.json", {"result": result})
    settings = {"columns": ["transform.x.p"], "rows": [[v] for v in values], "metrics": ["word_perplexity"]}
    sweep.run(Job("sweep", "s", "f" * 64, settings, inputs, tmp_path / "work", tmp_path / "out"))
    text = (tmp_path / "out" / "table.csv").read_text()
    assert text.splitlines()[:3] == [
        "transform.x.p,word_perplexity,word_perplexity_stderr,word_perplexity_n",
        "0.25,11.0,1.0,2",
        "null,12.0,1.0,2",
    ]
    again = read_sweep(text)
    assert [point for point, _ in again.points] == [[value] for value in values]
    assert again.csv() == text
    assert read_json(tmp_path / "out" / "sweep.json")["result"]["points"] == 5


def test_a_diverged_training_is_marked_in_its_row(tmp_path: Path) -> None:
    inputs = {}
    for index, (mean, diverged) in enumerate([(10.0, None), (math.inf, {"after_step": 3}), (9.0, None)]):
        inputs[f"{index:05}"], inputs[f"train-{index:05}"] = tmp_path / f"e{index}", tmp_path / f"t{index}"
        write_json(tmp_path / f"e{index}" / "result.json", {"result": arm([mean, mean], [BITFLIP], [0, 1])})
        write_json(tmp_path / f"t{index}" / "train.json", {"result": {"diverged": diverged}})
    settings = {"columns": ["lr"], "rows": [[1e-3], [1.0], [1e-4]], "metrics": ["word_perplexity"]}
    sweep.run(Job("sweep", "s", "f" * 64, settings, inputs, tmp_path / "work", tmp_path / "out"))
    text = (tmp_path / "out" / "table.csv").read_text()
    assert [line.rpartition(",")[2] for line in text.splitlines()] == ["diverged", "false", "true", "false"]
    again = read_sweep(text)
    assert (again.metrics, again.diverged) == (["word_perplexity"], [False, True, False])
    assert again.csv() == text
    assert "diverged" in (tmp_path / "out" / "table.svg").read_text()


def test_points_of_different_tasks_are_refused() -> None:
    other = {**arm([1.0], [], []), "task": {"type": "lm_eval", "task": "wikitext"}}
    with pytest.raises(UserError, match="different tasks"):
        make_sweep(["p"], [[0], [1]], [arm([1.0], [], []), other])
    with pytest.raises(UserError, match="no such metric"):
        make_sweep(["p"], [[0]], [arm([1.0], [], [])], ["acc"])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=4,
)


@given(st.lists(json_values, min_size=1, max_size=4), st.floats(allow_nan=False))
def test_every_axis_value_survives_the_csv(values: list[Any], mean: float) -> None:
    result = arm([1.0], [], [])
    result["metrics"] = {"m": {"mean": mean if math.isfinite(mean) else str(mean), "stderr": None, "n": 1}}
    made = make_sweep(["a"], [[value] for value in values], [result] * len(values))
    again = read_sweep(made.csv())
    shown = [json.dumps(point, sort_keys=True) for point, _ in again.points]
    assert shown == [json.dumps([value], sort_keys=True) for value in values]
    assert again.points[0][1]["m"].mean == mean
