"""Brings up a real Slurm, runs the cluster tests against it, takes it down: `python -m tests.cluster [pytest options]`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.cluster.minislurm import MiniSlurm

FOLDER = "ERRATA_MINISLURM"
WORKERS = "3"


def main() -> int:
    """The exit code of pytest; 0 and a loud word where no Slurm can be had."""
    if os.geteuid() != 0:
        print("\nNOT RUN: the cluster tests need root, to install and start a Slurm of their own\n", file=sys.stderr)
        return 1 if os.environ.get("CI") else 0
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that `finally` is reached
    with tempfile.TemporaryDirectory(prefix="errata-slurm-") as name:
        slurm = MiniSlurm(Path(name) / "slurm")
        try:
            slurm.up()
            options = sys.argv[1:] or ["-n", WORKERS]
            command = [sys.executable, "-m", "pytest", "tests/cluster", "--dist", "loadgroup", *options]
            return subprocess.run(command, env={**os.environ, FOLDER: str(slurm.folder)}).returncode
        finally:
            slurm.down()


if __name__ == "__main__":
    sys.exit(main())
