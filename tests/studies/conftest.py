"""Tests of a study need its committed JSON; of a study that has not been run yet this says so, loudly."""

from __future__ import annotations

from typing import Any

from studies.report import FOLDER

STUDIES = ("chaos", "defences", "efficient_training", "flips", "int2", "kills", "relora", "robustness")
NOT_RUN = [name for name in STUDIES if not (FOLDER / f"{name}.json").exists()]
collect_ignore = [f"test_{name}.py" for name in NOT_RUN]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for name in NOT_RUN:
        terminalreporter.write_line(
            f"NOT TESTED: study {name} has no studies/{name}.json yet: run `python -m studies.{name}`"
        )
