"""The study of 2-bit weights keeps to its budget, and its figures belong together."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.report import FOLDER as BENCHMARKS
from pipeline_lib.artifacts.files import read_json
from studies.int2 import LOSSES, SHARE, recovery, table
from studies.report import ROOT, load


@pytest.fixture(scope="module")
def study() -> dict[str, Any]:
    return load("int2")


def test_the_budget(study: dict[str, Any]) -> None:
    pretrain, distill = study["settings"]["pretraining"], study["settings"]["distillation"]
    tokens = [recipe["steps"] * recipe["global_batch"] * recipe["seq_len"] for recipe in (distill, pretrain)]
    assert study["share_of_tokens"] == tokens[0] / tokens[1] <= SHARE
    assert study["settings"]["transform"][0]["group_size"] == 128


def test_at_least_three_seeds_and_rates_chosen_on_validation(study: dict[str, Any]) -> None:
    assert len(set(study["seeds"])) >= 3
    assert set(study["losses"]) == set(LOSSES)
    for loss, runs in study["losses"].items():
        assert len(runs["seeds"]) == len(study["seeds"])
        found = study["valid_loss"][loss]
        assert found[study["lr"][loss]] == min(found.values())
        assert runs["seeds"][0]["valid_loss"] == found[study["lr"][loss]]
        assert all((seed["gamma"] is not None) == (loss == "cakld") for seed in runs["seeds"])


def test_recovery_is_0_as_rounded_and_1_as_the_teacher(study: dict[str, Any]) -> None:
    assert recovery(study, study["test"]["rounded"]) == 0
    assert recovery(study, study["test"]["plain-nano"]) == 1
    assert study["test"]["plain-nano"] < study["test"]["rounded"], "2 bits cost something"


def test_the_page_of_the_transform_shows_what_was_measured(study: dict[str, Any]) -> None:
    """Its table is the study's, its times, memory and sizes are the benchmark's."""
    text = (ROOT / "docs" / "int2.md").read_text()
    assert table(study) in text
    block = read_json(BENCHMARKS / "int2_block.json")
    qat, used = block["qat"], block["settings"]
    sizes = [f"| {row['packed MiB']} |" for row in block["whole_model"]]
    figures = [
        f"block takes {block['search_seconds_a_block']} s",
        f"would take {block['search_seconds_of_16_blocks_extrapolated']:.0f} s",
        f"takes {qat['step s']} s for {qat['tokens']} tokens",
        f"{qat['weights MiB']:.0f} MiB, the optimizer {qat['optimizer MiB']:.0f} MiB",
        f"allocates {qat['peak of a step MiB']:.0f} MiB",
        f"int2_block --threads {used['threads']} --qat",
    ]
    assert [figure for figure in (*sizes, *figures) if figure not in " ".join(text.split())] == []
