"""Arms that may be compared, and those that may not; statistics over fault seeds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from pipeline_lib.artifacts.files import read_json, write_json
from pipeline_lib.artifacts.job import Job
from pipeline_lib.config.errors import UserError
from pipeline_lib.evaluation.arms import merge_arms
from pipeline_lib.evaluation.statistics import summarise
from pipeline_lib.stages import result


def arm(**changes: Any) -> dict[str, Any]:
    return {
        "task": {"type": "lm_eval", "task": "pydocs", "limit": None},
        "transform": [],
        "fault_seeds": [],
        "seed": 0,
        "dtype": "float32",
        "inputs": {"checkpoint": "a" * 64},
        "n_samples": 9,
        "conditions": {"requests": "b" * 64},
        "metrics": {"word_perplexity": {"mean": 2.0, "stderr": None, "n": 1, "values": [2.0]}},
        "transform_report": {},
        **changes,
    }


FAULTY = {"transform": [{"type": "bitflip"}], "fault_seeds": [0, 1], "metrics": {}, "transform_report": {"layers": {}}}


def test_arms_that_differ_in_the_transform_are_merged() -> None:
    merged = merge_arms({"transformed": arm(**FAULTY), "clean": arm()})
    assert list(merged) == ["task", "clean", "transformed"]
    assert merged["transformed"]["fault_seeds"] == [0, 1]
    assert list(merge_arms({"clean": arm()})) == ["task", "clean"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("task", {"type": "lm_eval", "task": "pydocs", "limit": 5}),
        ("seed", 1),
        ("dtype", "bfloat16"),
        ("inputs", {"checkpoint": "c" * 64}),
        ("n_samples", 8),
        ("conditions", {"requests": "d" * 64}),
        ("something_new", 1),
    ],
)
def test_arms_that_differ_in_more_are_refused(key: str, value: Any) -> None:
    with pytest.raises(UserError, match=key):
        merge_arms({"transformed": arm(**FAULTY, **{key: value}), "clean": arm()})


def test_a_clean_arm_must_be_clean() -> None:
    with pytest.raises(UserError, match="clean arm"):
        merge_arms({"clean": arm(**FAULTY)})
    with pytest.raises(UserError, match="clean arm"):
        merge_arms({"transformed": arm(**FAULTY)})


def test_the_stage_keeps_the_evaluators_json(tmp_path: Path) -> None:
    inputs = {}
    for name, value in (("clean", arm()), ("transformed", arm(**FAULTY))):
        folder = inputs[name] = tmp_path / name
        write_json(folder / "result.json", {"result": value, "provenance": {"device": "cpu"}})
        write_json(folder / "evaluator" / f"{name}.json", {"results": {"pydocs": 1}})
    result.run(Job("result", "x", "f" * 64, {}, inputs, tmp_path / "work", tmp_path / "out"))
    written = read_json(tmp_path / "out" / "result.json")
    assert set(written["result"]) == {"task", "clean", "transformed"}
    assert written["evaluator"]["clean"] == {"clean": {"results": {"pydocs": 1}}}
    assert written["provenance"]["arms"]["transformed"] == {"device": "cpu"}


def test_summary_of_repetitions() -> None:
    summary = summarise([1.0, 2.0, 4.0])
    assert summary["mean"] == pytest.approx(7 / 3)
    assert summary["stderr"] == pytest.approx(math.sqrt((16 + 1 + 25) / 9 / 2 / 3))
    assert summary["values"] == [1.0, 2.0, 4.0]
    assert summarise([3.0])["stderr"] is None
    assert summarise([1.0, math.inf]) == {"mean": "inf", "stderr": None, "n": 2, "values": [1.0, "inf"]}
    assert summarise([math.inf, -math.inf])["mean"] == "nan"
    with pytest.raises(ValueError, match="no values"):
        summarise([])
