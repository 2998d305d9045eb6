"""A signal to all processes of a job, as Slurm and Ctrl-C send it: the stage saves before Snakemake ends."""

from __future__ import annotations

import copy
import re
import signal
import time
from pathlib import Path

import psutil

from tests.faults.kill import alive
from tests.workflow.clone import TINY, Clone


def test_a_signal_to_the_whole_job_loses_no_step(tmp_path: Path) -> None:
    config = copy.deepcopy(TINY)
    config["models"]["tiny"]["recipe"]["pretrain"]["steps"] = 500
    config["models"]["tiny"]["run"].update(checkpoint_every=1000, log_every=1)
    clone = Clone.make(tmp_path / "clone", config)
    process = clone.start("results/plain-tiny/words.json")
    seen, end = 0, time.monotonic() + 120
    while seen < 5:
        assert time.monotonic() < end and process.poll() is None, process.communicate()
        for metrics in (clone.root / "results" / "work").glob("train--*/metrics.jsonl"):
            seen = len(metrics.read_text().splitlines())
        time.sleep(0.02)
    [stage] = [psutil.Process(pid) for pid in alive(clone.root, b"pipeline_lib\0stage")]
    assert stage.ppid() == process.pid, "no shell stands between Snakemake and the stage"
    for child in psutil.Process(process.pid).children(recursive=True):
        child.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert not alive(clone.root), "the stage ended before Snakemake did"
    [log] = (clone.root / "results" / "logs" / "train").glob("*.log")
    for text in (output, log.read_text()):
        [stopped] = set(re.findall(r"stopped after step (\d+)", text))
        assert int(stopped) >= seen
    assert f"goes on from step {stopped}" in clone.snakemake("results/plain-tiny/words.json")
