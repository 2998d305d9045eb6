"""From a teacher to its 2-bit student through Snakemake: records, ranges, training, packing, and what is shared."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from tests.workflow.clone import TINY, Clone

pytestmark = pytest.mark.slow

DATA = {"n": 12, "max_new_tokens": 6, "prompts": [{"prefix_chars": 20, "min_chars": 40}]}
TARGETS = ("results/student/words.json", "results/student/speed.json")


def config(**recipe: Any) -> dict[str, Any]:
    made = copy.deepcopy(TINY)
    made["transforms"]["int2"] = {"clip": {}}
    distill = {"steps": 3, "global_batch": 4, "seq_len": 16, "lr": 1e-3, "data": DATA, **recipe}
    made["experiments"] = {
        "plain-tiny": {},
        "student": {
            "from": "plain-tiny",
            "transform": {"int2": {"group_size": 32}},
            "teacher": "plain-tiny",
            "recipe": {"distill": distill},
        },
    }
    made["tasks"]["speed"] = {
        "type": "speed", "dataset": "words", "prompt_tokens": 8, "prompts": 3, "warmup": 1,
        "decoding": {"max_new_tokens": 6, "prompt_lookup": 2}, "profile": True,
    }  # fmt: skip
    made["sweeps"] = {}
    return made


def test_teacher_to_student(tmp_path: Path) -> None:
    clone = Clone.make(tmp_path / "clone", config())
    planned = clone.would_run(*TARGETS)
    assert planned["teacher"] == planned["clip"] == 1
    clone.snakemake(*TARGETS)
    store = clone.root / "results" / "store"
    [records] = store.glob("teacher/*/records.jsonl")
    assert 8 <= len(records.read_text().split("\n")) - 1 <= 12, "a few prompts are alike"
    words = json.loads((clone.root / TARGETS[0]).read_text())["result"]
    assert {"clean", "transformed"} <= set(words)
    clip = json.loads(next(store.glob("clip/*/clip.json")).read_text())["result"]["total"]
    assert clip["group_error_after"] < clip["group_error_before"]
    [sizes] = store.glob("convert/*/packed/sizes.json")
    assert json.loads(sizes.read_text())["result"]["layers"]["theoretical_bits_per_weight"] == 2 + 18 / 32
    speed = json.loads((clone.root / TARGETS[1]).read_text())["result"]
    for arm in ("clean", "transformed"):
        assert speed[arm]["metrics"]["lookup_divergence"]["mean"] == 0.0
    assert speed["transformed"]["metrics"]["model_mib"]["mean"] < speed["clean"]["metrics"]["model_mib"]["mean"]
    assert list(store.glob("evaluate/*/log/clean/trace.json"))
    before = clone.digest(TARGETS[0])
    assert clone.would_run(*TARGETS) == {}
    clone.write_config(config(loss="jsd"))
    assert clone.would_run(TARGETS[0]).get("teacher") is None, "another loss learns from the same records"
    assert clone.would_run(TARGETS[0])["train"] == 1
    clone.write_config(config())
    assert clone.digest(TARGETS[0]) == before
