"""The six traps of Snakemake on Slurm: none is set in our profile and rules, and each would be noticed.

Measured on a real Slurm with the executor plugin 2.8.0; what falls into each is in docs/cluster.md. That the profile as it
is gets through the faults themselves is shown by tests/cluster.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
LOST_POLLS_S = 100
"""A failing squeue is survived for at least as long."""


def rules(folder: Path) -> dict[str, str]:
    """{name: text} of all rules."""
    text = "\n".join(path.read_text() for path in sorted((folder / "rules").glob("*.smk")))
    return dict(re.findall(r"^rule (\w+):\n((?:[ \t].*\n|\n)+)", text, flags=re.M))


def traps(folder: Path) -> set[str]:
    """The traps that are set in a checkout."""
    profile = yaml.safe_load((folder / "slurm" / "profile.yaml").read_text())
    found = set()
    for name, text in rules(folder).items():
        output = re.search(r"^    output:\n((?:        .*\n)+)", text, flags=re.M)
        assert output, name
        if re.search(r"^\s+retries:", text, flags=re.M):
            found.add("retries in a rule")
        if re.search(r"directory\(|update\(|results/work|\n\s+shadow:", output.group(1)) or "shadow:" in text:
            found.add("checkpoints as output")
        stays_here = re.search(r"localrule: True", text) or name.endswith("_result")
        if not stays_here and f'slurm_extra=slurm_options("{name}")' not in text:
            found.add("duplicates after a kill")
    if "retries" not in profile:
        found.add("no retries in the profile")
    if profile.get("slurm-status-command") != "squeue":
        found.add("sacct")
    if profile.get("slurm-status-attempts", 5) / profile.get("max-status-checks-per-second", 10) < LOST_POLLS_S:
        found.add("one lost poll")
    if profile.get("slurm-requeue") is not True or profile.get("slurm-no-requeue"):
        found.add("preemption without requeue")
    return found


SET = {
    "retries in a rule": ("rules/train.smk", 'threads: run_setting("train"', 'retries: 2\n    threads: run_setting("train"'),
    "checkpoints as output": (
        "rules/train.smk",
        '"results/store/train/{id}/manifest.json",',
        '"results/store/train/{id}/manifest.json",\n        directory("results/work/{id}"),',
    ),
    "sacct": ("slurm/profile.yaml", "slurm-status-command: squeue", "slurm-status-command: sacct"),
    "one lost poll": ("slurm/profile.yaml", "slurm-status-attempts: 60", "slurm-status-attempts: 5"),
    "preemption without requeue": ("slurm/profile.yaml", "slurm-requeue: true", "slurm-no-requeue: true"),
    "duplicates after a kill": ("rules/evaluate.smk", '            slurm_extra=slurm_options("evaluate"),\n', ""),
    "no retries in the profile": ("slurm/profile.yaml", "retries: 3 ", "# "),
}  # fmt: skip


def test_no_trap_is_set() -> None:
    assert len(rules(ROOT)) > 15
    assert traps(ROOT) == set()


@pytest.mark.parametrize("name", SET)
def test_a_trap_that_is_set_is_noticed(name: str, tmp_path: Path) -> None:
    for folder in ("rules", "slurm"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    file, before, after = SET[name]
    text = (tmp_path / file).read_text()
    assert before in text
    (tmp_path / file).write_text(text.replace(before, after, 1))
    assert traps(tmp_path) == {name}
