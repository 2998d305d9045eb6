"""Snakemake's own tools work on the workflow: report, lint, rule graph, and both Snakefiles."""

from __future__ import annotations

import re

import pytest

from tests.workflow.clone import Clone
from tests.workflow.conftest import TARGETS


def test_report_opens_and_holds_the_results(copied: Clone) -> None:
    copied.snakemake(*TARGETS, "--report", "snakemake-report.html")
    page = (copied.root / "snakemake-report.html").read_text()
    assert "words.json" in page
    assert not re.search(r'<script[^>]+src="https?://', page), "the report must open offline"


def test_report_works_after_a_lost_record(copied: Clone) -> None:
    import shutil

    shutil.rmtree(copied.root / ".snakemake", ignore_errors=True)
    copied.snakemake(*TARGETS, "--report", "snakemake-report.html")


def test_lint_is_clean(copied: Clone) -> None:
    assert "Congratulations" in copied.snakemake("--lint")


@pytest.mark.parametrize("snakefile", ["Snakefile", "workflow/Snakefile"])
def test_both_snakefiles_plan(copied: Clone, snakefile: str) -> None:
    output = copied.snakemake("-n", "-s", snakefile, *TARGETS)
    assert "Nothing to be done" in output


def test_rerun_incomplete_and_forced_rules_lose_nothing(copied: Clone) -> None:
    """`-R train` deletes manifests; the stages adopt what is sealed instead of training again."""
    before = copied.digest(*TARGETS)
    trained = {p: p.stat().st_mtime_ns for p in (copied.root / "results/store/train").glob("*/model.safetensors")}
    output = copied.snakemake(*TARGETS, "-R", "convert")
    assert copied.digest(*TARGETS) == before
    assert {p: p.stat().st_mtime_ns for p in trained} == trained
    assert "Traceback" not in output
