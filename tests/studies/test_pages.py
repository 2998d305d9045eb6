"""Every page and picture of a study is what its committed JSON gives; another number would give another page."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from studies import chaos, defences, efficient_training_page, flips, int2, kills, optical_page, relora_page, robustness
from studies.report import FOLDER, ROOT, Derive, load

ALL: dict[str, Derive] = {
    "chaos": chaos.derive,
    "defences": defences.derive,
    "efficient_training": efficient_training_page.derive,
    "flips": flips.derive,
    "int2": int2.derive,
    "kills": kills.derive,
    "optical": optical_page.derive,
    "relora": relora_page.derive,
    "robustness": robustness.derive,
}
DERIVE = {name: derive for name, derive in ALL.items() if (FOLDER / f"{name}.json").exists()}


def raise_a_mean(study: dict[str, Any]) -> None:
    study["cells"][0][1]["mean"] *= 1.01


def raise_a_seed(study: dict[str, Any]) -> None:
    study["cells"][1][0]["seeds"][2]["mean"] *= 1.01


def change_a_setting(study: dict[str, Any]) -> None:
    study["settings"]["training"]["recipe"]["lr"] *= 2


def change_a_point(study: dict[str, Any]) -> None:
    study["csv"][7] = study["csv"][7].replace("4.0", "4.1")


def change_a_time(study: dict[str, Any]) -> None:
    study["points"][3]["seconds_to_mend"] += 1


def raise_a_row(study: dict[str, Any]) -> None:
    study["rows"]["trained clipped"]["transformed"]["seeds"][1]["mean"] *= 1.01


def change_a_limit(study: dict[str, Any]) -> None:
    study["settings"]["training"]["clipped"]["recipe"]["clip_weights"][0][1] *= 2


def lose_a_kill(study: dict[str, Any]) -> None:
    study["random"].pop()


def change_a_fault(study: dict[str, Any]) -> None:
    study["faults"][5]["steps_lost"] += 1


def raise_a_recovery(study: dict[str, Any]) -> None:
    study["losses"]["cakld"]["seeds"][0]["test"] *= 1.01


def change_a_size(study: dict[str, Any]) -> None:
    study["speed"]["int2"]["model_mib"] *= 1.01


def worsen_a_loss(study: dict[str, Any]) -> None:
    next(iter(study["cells"].values()))["points"][-1]["valid"] += 0.1


def use_more_memory(study: dict[str, Any]) -> None:
    study["large"]["arms"]["relora"]["measured"] *= 1.1


def lower_a_cell(study: dict[str, Any]) -> None:
    study["cells"]["full.64.s1"]["mean"] *= 0.99


def lose_a_training(study: dict[str, Any]) -> None:
    study["cells"]["lora.16.s0"]["diverged"] = True


def change_a_value(study: dict[str, Any]) -> None:
    study["values"]["0.1.0"][0] += 0.1


def do_more_work(study: dict[str, Any]) -> None:
    study["work"]["1.1"]["steps"] += 100


EDITS: list[tuple[str, Callable[[dict[str, Any]], None]]] = [
    ("robustness", raise_a_mean),
    ("robustness", raise_a_seed),
    ("robustness", change_a_setting),
    ("defences", raise_a_row),
    ("defences", change_a_limit),
    ("chaos", change_a_fault),
    ("efficient_training", change_a_value),
    ("efficient_training", do_more_work),
    ("flips", change_a_point),
    ("flips", change_a_setting),
    ("int2", raise_a_recovery),
    ("int2", change_a_size),
    ("kills", change_a_time),
    ("kills", lose_a_kill),
    ("optical", lower_a_cell),
    ("optical", lose_a_training),
    ("relora", worsen_a_loss),
    ("relora", use_more_memory),
]


def test_every_committed_study_is_derived_here() -> None:
    assert {path.stem for path in FOLDER.glob("*.json")} <= set(ALL)


@pytest.mark.parametrize("name", DERIVE)
def test_pages_are_what_the_json_gives(name: str) -> None:
    for path, text in DERIVE[name](load(name)).items():
        assert (ROOT / path).read_text() == text, f"{path}: run `python -m studies.{name} --pages`"


def test_no_page_is_without_a_study() -> None:
    derived = {path for name, derive in DERIVE.items() for path in derive(load(name)) if "/studies/" in path}
    assert {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs" / "studies").glob("*")} == derived


@pytest.mark.parametrize(("name", "edit"), [edit for edit in EDITS if edit[0] in DERIVE])
def test_another_number_gives_another_page(name: str, edit: Callable[[dict[str, Any]], None]) -> None:
    study = load(name)
    changed = copy.deepcopy(study)
    edit(changed)
    assert DERIVE[name](changed) != DERIVE[name](study)
