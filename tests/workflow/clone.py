"""A working copy of the repository with a tiny configuration, and Snakemake run in it as a user would."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]

TINY: dict[str, Any] = {
    "tokenizers": {"words": {"train": {"dataset": "words", "vocab_size": 300}}},
    "datasets": {"words": {"source": {"type": "local", "path": "data/*.jsonl"}, "split": {"valid": 0.2, "test": 0.2}}},
    "models": {
        "tiny": {
            "llama": {"dim": 32, "layers": 2, "heads": 2, "kv_heads": 1, "ffn": 64},
            "tokenizer": "words",
            "dataset": "words",
            "recipe": {
                "pretrain": {
                    "tokens_per_parameter": None, "steps": 6, "global_batch": 4, "seq_len": 16, "lr": 1e-3, "precision": "fp32",
                }
            },
            "tasks": ["words"],
            "run": {"checkpoint_every": 2, "log_every": 2, "gpus": 0, "threads": 1},
        }
    },
    "transforms": {"plain": {}, "bitflip": {"weight": {"p": 1e-3, "zero_out": 1.25}, "input": {"p": 1e-3, "zero_out": 30.0}}},
    "tasks": {"words": {"type": "lm_eval", "task": "pydocs", "dataset": "words", "max_length": 16, "limit": 3}},
    "experiments": {"plain-tiny": {}, "bitflip-tiny": {}},
    "sweeps": {
        "p": {"experiment": "bitflip-tiny", "task": "words", "grid": {"transform.bitflip.input.zero_out": [30.0, 3.0]}},
    },
    "fault_seeds": 2,
    "tracking": {"wandb": "off"},
}  # fmt: skip

WORDS = [
    "the",
    "a",
    "small",
    "model",
    "learns",
    "to",
    "read",
    "old",
    "books",
    "about",
    "trees",
    "and",
    "rivers",
    "while",
    "it",
    "rains",
    "on",
    "every",
    "second",
    "day",
]


def write_words(folder: Path, documents: int = 60, seed: int = 0) -> None:
    """Deterministic text: sentences of common words."""
    folder.mkdir(parents=True, exist_ok=True)
    state = seed * 7919 + 1
    lines = []
    for number in range(documents):
        words = []
        for _ in range(40):
            state = (state * 1103515245 + 12345) % 2**31
            words.append(WORDS[(state >> 16) % len(WORDS)])
        lines.append(json.dumps({"id": f"doc-{number}", "text": " ".join(words) + "."}))
    (folder / "words.jsonl").write_text("\n".join(lines) + "\n")


@dataclass
class Clone:
    """A copy of the repository's files at `root`."""

    root: Path

    @staticmethod
    def make(root: Path, config: dict[str, Any] | None = None) -> Clone:
        """Copy what git would clone (and what is new and not ignored), with a tiny config and data."""
        listed = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split("\n")
        for name in listed:
            if name and not name.startswith(("tests/", "docs/", ".git")) and (ROOT / name).is_file():
                target = root / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, target)
                for compiled in (ROOT / name).parent.glob(f"__pycache__/{target.stem}.*.pyc"):
                    beside = target.parent / "__pycache__"
                    beside.mkdir(exist_ok=True)
                    shutil.copy2(compiled, beside / compiled.name)
        clone = Clone(root)
        clone.write_config(config or TINY)
        write_words(root / "data")
        return clone

    def copy_results_from(self, other: Clone) -> None:
        """Bring another clone's results along."""
        shutil.rmtree(self.root / "results", ignore_errors=True)
        shutil.copytree(other.root / "results", self.root / "results", symlinks=True)

    def copy_snakemake_from(self, other: Clone) -> None:
        """Bring another clone's Snakemake records along."""
        if (other.root / ".snakemake").exists():
            shutil.copytree(other.root / ".snakemake", self.root / ".snakemake", symlinks=True, dirs_exist_ok=True)

    def write_config(self, config: dict[str, Any]) -> None:
        """Replace config.yaml."""
        (self.root / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))

    def environment(self, extra: dict[str, str] | None = None) -> dict[str, str]:
        """The environment of commands: no proxies, wandb or hub settings of the machine."""
        kept = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy") and not k.startswith("WANDB")}
        kept.update({"OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", **(extra or {})})
        kept.pop("PYTHONPATH", None)
        if extra and "PYTHONPATH" in extra:
            kept["PYTHONPATH"] = extra["PYTHONPATH"]
        return kept

    def start(self, *arguments: str, extra: dict[str, str] | None = None, cores: int = 2) -> subprocess.Popen[str]:
        """`snakemake …` in a session of its own, so that all of it can be killed at once."""
        return subprocess.Popen(
            [sys.executable, "-m", "snakemake", "--cores", str(cores), *arguments],
            cwd=self.root,
            env=self.environment(extra),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def snakemake(
        self, *arguments: str, ok: bool = True, extra: dict[str, str] | None = None, seconds: float = 500
    ) -> str:
        """Run to the end; the output."""
        process = self.start(*arguments, extra=extra)
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        assert (process.returncode == 0) == ok, f"rc {process.returncode}\n{output[-6000:]}"
        return output

    def run(self, *arguments: str, ok: bool = True) -> str:
        """`python -m pipeline_lib …`; the output."""
        done = subprocess.run(
            [sys.executable, "-m", "pipeline_lib", *arguments],
            cwd=self.root,
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert (done.returncode == 0) == ok, done.stdout + done.stderr
        return done.stdout + done.stderr

    def would_run(self, *targets: str) -> dict[str, int]:
        """{rule: jobs} that `snakemake -n` lists."""
        return jobs(self.snakemake("-n", *targets))

    def digest(self, *targets: str) -> str:
        """The digest of targets."""
        return self.run("digest", *targets).strip().splitlines()[-1]


def jobs(output: str) -> dict[str, int]:
    """{rule: jobs} from Snakemake's table of job counts; {} when there is nothing to do."""
    table = re.search(r"^job +count\n-+ +-+\n(.*?)^total", output, flags=re.M | re.S)
    if not table:
        assert "Nothing to be done" in output or "nothing to be done" in output, output[-3000:]
        return {}
    rows = (line.split() for line in table.group(1).splitlines())
    return {name: int(count) for name, count in rows if name != "all"}
