"""Training speed of `nano` on a CPU: ours against the Hugging Face Trainer and a minimal hand-written loop.

    python -m benchmarks.nano_training [--rounds 5] [--steps 60] [--skip 10] [--threads 2]

All three train the model of config.yaml's `plain-nano` from the same initial weights on the same sequences in the same
order, in fp32, with fused AdamW, gradient clipping, the same schedule and a loss read every 10 steps; they end with the
same loss, which is checked. Ours is the stage's whole training path (torchtitan behind `training.run`), the rivals get
their sequences ready-made in memory. Each run is a process of its own and counts tokens from the end of step `skip` to
the end of the last; the three take turns. Prints medians and ranges and writes benchmarks/nano_training.json. The goal
is a ratio to the faster rival of at least 1.0.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.report import write
from pipeline_lib.artifacts.files import write_json

ROOT = Path(__file__).resolve().parents[1]
CONTESTANTS = ("errata", "transformers.Trainer", "hand-written loop")
LOG_EVERY = 10
TOLERANCE = 1e-3
"""Largest relative difference of the last losses: the same sums in another order, over all steps."""


def settings(steps: int) -> dict[str, Any]:
    """The training stage's settings of `plain-nano`, for `steps` steps."""
    from pipeline_lib.config.plan import Plan

    plan = Plan.load(str(ROOT / "config.yaml"), {"models": {"nano": {"recipe": {"pretrain": {"steps": steps}}}}})
    return plan.resolver.train(plan.resolver.experiments.get("plain-nano")).settings


def make_tokens(folder: Path, vocab: int, count: int) -> None:
    """A tokens artifact of random text."""
    import numpy as np
    from safetensors.numpy import save_file

    folder.mkdir()
    # Squaring skews the frequencies, so that there is something to learn and the losses can be compared.
    tokens = (np.random.default_rng(0).random(count) ** 2 * vocab).astype(np.uint16)
    save_file({"tokens": tokens, "document_starts": np.zeros(1, np.int64)}, folder / "train-00000.safetensors")
    shards = {"train": [{"file": "train-00000.safetensors", "tokens": count}]}
    result = {"vocab_size": vocab, "bos": 0, "eos": 1, "pad": 2, "tokens": {"train": count}, "shards": shards}
    write_json(folder / "tokens.json", {"result": result})


def contest(name: str, folder: Path, threads: int) -> dict[str, float]:
    """One run in a process of its own: {tokens_per_s, loss}."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "WANDB_MODE": "disabled"}
    command = [sys.executable, "-m", "benchmarks.nano_contestants", name, str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{name}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def summary(runs: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """One row a contestant; `ratio` is ours to it, the median and the range over the rounds."""
    ours = [run["tokens_per_s"] for run in runs[CONTESTANTS[0]]]
    rows = []
    for name, own in runs.items():
        speeds = [run["tokens_per_s"] for run in own]
        ratios = [a / b for a, b in zip(ours, speeds, strict=True)]
        rows.append(
            {
                "training": name,
                "tokens/s": round(statistics.median(speeds)),
                "range": f"{min(speeds):.0f}-{max(speeds):.0f}",
                "errata's ratio to it": round(statistics.median(ratios), 3),
                "ratio range": f"{min(ratios):.2f}-{max(ratios):.2f}",
                "last loss": round(own[0]["loss"], 4),
            }
        )
    return rows


def check_same_work(runs: dict[str, list[dict[str, float]]]) -> None:
    """The contestants did the same training.

    Raises:
        RuntimeError: their last losses differ.
    """
    losses = [run["loss"] for own in runs.values() for run in own]
    if max(losses) - min(losses) > TOLERANCE * min(losses):
        raise RuntimeError(f"the trainings ended with different losses, so they are not the same work: {losses}")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--skip", type=int, default=10, help="first steps that are not counted; logged, so of 10s")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    stage = settings(given.steps)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in CONTESTANTS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_tokens(folder / "tokens", stage["model"]["vocab"], 2**20)
        write_json(folder / "contest.json", {"settings": stage, "skip": given.skip, "log_every": LOG_EVERY})
        for number in range(given.rounds):
            turn = number % len(CONTESTANTS)  # nobody always goes first
            for contestant in CONTESTANTS[turn:] + CONTESTANTS[:turn]:
                runs[contestant].append(contest(contestant, folder, given.threads))
    check_same_work(runs)
    rows = summary(runs)
    faster = min(row["errata's ratio to it"] for row in rows[1:])
    print(f"ratio to the faster rival: {faster}", file=sys.stderr)
    figures = {"settings": {**vars(given), "training": stage}, "runs": runs, "ratio_to_the_faster_rival": faster}
    write("nano_training", figures, rows)


if __name__ == "__main__":
    main()
