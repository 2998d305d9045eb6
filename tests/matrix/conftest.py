"""At the end, every combination that was not run, with the reason that was declared for it."""

from __future__ import annotations

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what tests recorded as the properties `run` and `refused`."""
    found: dict[str, list[str]] = {"run": [], "refused": []}
    for report in terminalreporter.stats.get("passed", []):
        for key, value in getattr(report, "user_properties", []):
            if key in found and report.when == "call":
                found[key].append(str(value))
    if any(found.values()):
        terminalreporter.section("the matrix: transform × recipe × model family")
        terminalreporter.write_line(f"{len(found['run'])} combinations run, {len(found['refused'])} refused:")
        for line in sorted(found["refused"]):
            terminalreporter.write_line(f"  {line}")
