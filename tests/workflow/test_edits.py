"""Edits → stages: exactly what an edit makes stale runs, nothing else, and reverting it costs nothing."""

from __future__ import annotations

import copy
import json
import os
import random
import re
import shutil
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.workflow.clone import Clone, write_words
from tests.workflow.conftest import CONFIG, TARGETS

pytestmark = pytest.mark.slow

Edit = Callable[[Clone], None]


def config(path: str, value: Any) -> Edit:
    """Set one key of config.yaml."""

    def edit(clone: Clone) -> None:
        changed = copy.deepcopy(CONFIG)
        place = changed
        *parents, last = path.split("/")
        for part in parents:
            place = place.setdefault(part, {})
        place[last] = value
        clone.write_config(changed)

    return edit


def comment(clone: Clone) -> None:
    path = clone.root / "config.yaml"
    path.write_text("# a comment\n" + path.read_text() + "\n# another\n")


def key_order(clone: Clone) -> None:
    def reverse(value: Any) -> Any:
        return {k: reverse(v) for k, v in reversed(value.items())} if isinstance(value, dict) else value

    clone.write_config(reverse(CONFIG))


def code_comment(clone: Clone) -> None:
    path = clone.root / "pipeline_lib" / "stages" / "train.py"
    path.write_text(path.read_text() + "\n# a comment\n")


def shell_command(clone: Clone) -> None:
    path = clone.root / "rules" / "common.smk"
    path.write_text(path.read_text().replace("pipeline_lib stage {output}", "pipeline_lib  stage {output}"))


def stage_version(clone: Clone) -> None:
    path = clone.root / "pipeline_lib" / "config" / "stages.py"
    text = path.read_text()
    path.write_text(re.sub(r'(?<="convert": )Stage\((\d+)\)', lambda match: f"Stage({int(match[1]) + 1})", text))
    assert path.read_text() != text


def touch(clone: Clone) -> None:
    for path in clone.root.rglob("*"):
        if path.is_file():
            path.touch()


def scramble(clone: Clone) -> None:
    clock = random.Random(1)
    for path in (clone.root / "results").rglob("*"):
        if path.is_file():
            when = time.time() + clock.uniform(-1e6, 1e5)
            os.utime(path, (when, when))


def delete(pattern: str) -> Edit:
    def edit(clone: Clone) -> None:
        found = list((clone.root / "results").glob(pattern))
        assert found
        for path in found:
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return edit


def text(clone: Clone) -> None:
    write_words(clone.root / "data", seed=1)


def rename(clone: Clone) -> None:
    changed = copy.deepcopy(CONFIG)
    changed["experiments"] = {"my-plain": {"model": "tiny"}, **changed["experiments"]}
    clone.write_config(changed)


def hand_edit(clone: Clone) -> None:
    path = clone.root / TARGETS[0]
    path.write_text(path.read_text().replace("result", "rezult", 1))


def damage_view(clone: Clone) -> None:
    os.truncate(clone.root / TARGETS[2], 3)


AFTER_TRAIN = {"convert": 2, "evaluate": 3, "result": 2, "experiment_result": 2, "sweep": 1, "sweep_result": 1}
ALL = {"dataset": 1, "tokenizer": 1, "tokens": 1, "train": 2, **AFTER_TRAIN}

# name: (edit, the jobs it must cause)
EDITS: dict[str, tuple[Edit, dict[str, int]]] = {
    "a comment in config.yaml": (comment, {}),
    "key order": (key_order, {}),
    "GPU count": (config("models/tiny/run/gpus", 8), {}),
    "per-device batch": (config("models/tiny/run/micro_batch", 2), {}),
    "a comment in the code": (code_comment, {}),
    "the text of a shell command": (shell_command, {}),
    "touched files": (touch, {}),
    "scrambled mtimes, some in the future": (scramble, {}),
    "deleted intermediate that nobody needs": (delete("store/tokens/*"), {}),
    "learning rate": (config("models/tiny/recipe/pretrain/lr", 2e-3), {"train": 2, **AFTER_TRAIN}),
    "seed of one experiment": (
        config("experiments/bitflip-tiny/seed", 1),
        {"train": 1, "convert": 1, "evaluate": 2, "result": 1, "experiment_result": 1},
    ),
    "evaluation-time p": (config("sweeps/p/grid", {"transform.bitflip.weight.p": [0.0, 2e-2]}), {"sweep": 1, "sweep_result": 1}),
    "training-time p": (
        config("transforms/bitflip/weight/p", 2e-3),
        {"train": 1, "convert": 1, "evaluate": 2, "result": 1, "experiment_result": 1},
    ),
    "evaluation limit": (
        config("tasks/words/limit", 2),
        {"evaluate": 3, "result": 2, "experiment_result": 2, "sweep": 1, "sweep_result": 1},
    ),
    "fault seeds": (
        config("fault_seeds", 3),
        {"evaluate": 1, "result": 1, "experiment_result": 1, "sweep": 1, "sweep_result": 1},
    ),
    "tokenizer size": (
        config("tokenizers/words/train/vocab_size", 320),
        {"tokenizer": 1, "tokens": 1, "train": 2, **AFTER_TRAIN},
    ),
    "text of the dataset": (text, ALL),
    "stage version of convert": (stage_version, AFTER_TRAIN),
    "deleted result": (delete("plain-tiny/words.json"), {"experiment_result": 1}),
    "hand-edited result": (hand_edit, {"experiment_result": 1}),
    "torn CSV": (damage_view, {"sweep_result": 1}),
}  # fmt: skip


@pytest.mark.parametrize("situation", ["as it is", "without .snakemake", "fresh clone"])
@pytest.mark.parametrize("name", EDITS)
def test_edit_and_revert(name: str, situation: str, copied: Clone) -> None:
    if situation != "as it is":
        shutil.rmtree(copied.root / ".snakemake", ignore_errors=True)
    if situation == "fresh clone":
        for path in copied.root.rglob("*"):  # as git and a copy leave them: every file new
            if path.is_file():
                path.touch()
    edit, expected = EDITS[name]
    edit(copied)
    assert copied.would_run(*TARGETS) == expected
    if "deleted" not in name and "hand-edited" not in name and "torn" not in name:
        fresh = Clone.make(copied.root, CONFIG)  # lays the unedited files over
        assert fresh.would_run(*TARGETS) == {}, "reverting must cost nothing"


def test_renamed_experiment_reruns_one_copy(copied: Clone) -> None:
    rename(copied)
    assert copied.would_run("results/my-plain/words.json") == {"experiment_result": 1}


def test_edit_runs_and_revert_gives_the_same_bytes(copied: Clone) -> None:
    """Not only listed but run: evaluation alone, old artifacts kept, and the first result again after reverting."""
    before = {target: (copied.root / target).read_bytes() for target in TARGETS}
    store = copied.root / "results" / "store"
    artifacts = set(store.glob("*/*"))
    config("tasks/words/limit", 2)(copied)
    copied.snakemake(*TARGETS)
    new = {path.parent.name for path in set(store.glob("*/*")) - artifacts}
    assert new == {"evaluate", "result", "sweep"}
    assert artifacts <= set(store.glob("*/*"))
    changed = json.loads((copied.root / TARGETS[0]).read_text())
    assert changed["result"] != json.loads(before[TARGETS[0]])["result"]
    copied.write_config(CONFIG)
    copied.snakemake(*TARGETS)
    assert {target: (copied.root / target).read_bytes() for target in TARGETS} == before
    assert copied.would_run(*TARGETS) == {}


def test_plan_and_status_say_why(copied: Clone) -> None:
    config("models/tiny/recipe/pretrain/lr", 2e-3)(copied)
    plan = copied.run("plan", TARGETS[0])
    assert "recipe.lr 0.001 → 0.002" in plan
    assert "present  tokens" in plan
    assert f"stale     {TARGETS[0]}" in copied.run("status")
    copied.write_config(CONFIG)
    assert "all results are fresh" in copied.run("status")


def test_explain_shows_chain_and_difference(copied: Clone) -> None:
    chain = copied.run("explain", TARGETS[0])
    for stage in ("result", "evaluate", "convert", "train", "tokens", "tokenizer", "dataset"):
        assert f"results/store/{stage}/" in chain
    assert "recipe.lr = 0.001" in chain
    difference = copied.run("explain", TARGETS[0], TARGETS[1])
    assert "bitflip" in difference


def test_prune_keeps_what_is_used(copied: Clone) -> None:
    assert "0 artifacts" in copied.run("prune")
    changed = copy.deepcopy(CONFIG)
    changed["sweeps"] = {}
    copied.write_config(changed)
    (copied.root / TARGETS[2]).unlink()
    listed = copied.run("prune")
    assert "results/store/sweep/" in listed
    assert list((copied.root / "results/store/sweep").iterdir())
    copied.run("prune", "--delete")
    assert not list((copied.root / "results/store/sweep").iterdir())
    assert copied.would_run(*TARGETS[:2]) == {}
