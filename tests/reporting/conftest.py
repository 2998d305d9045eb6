"""Artifacts such as a demo leaves: four experiments, a table, two sweeps; sealed as the runner seals them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from pipeline_lib.artifacts.files import write_bytes, write_json
from pipeline_lib.artifacts.job import Job
from pipeline_lib.artifacts.store import publish
from pipeline_lib.config.fingerprint import fingerprint
from pipeline_lib.evaluation.statistics import summarise
from pipeline_lib.stages import sweep, table

BITFLIP = {"type": "bitflip", "input": {"p_exp": 2**-14, "p_frac": 2**-10}, "weight": {"p_exp": None, "p_frac": 2**-10}}
TASK = {"type": "lm_eval", "task": "pydocs", "dataset": "pydocs"}


def arm(perplexities: list[float], transform: list[dict[str, Any]], seeds: list[int]) -> dict[str, Any]:
    """`result` of an evaluate artifact."""
    return {
        "task": TASK,
        "transform": transform,
        "fault_seeds": seeds,
        "seed": 0,
        "dtype": "float32",
        "inputs": {"checkpoint": "a" * 64},
        "n_samples": 41,
        "conditions": {"higher_is_better": {"pydocs": {"word_perplexity": False, "byte_perplexity": False}}},
        "metrics": {
            "word_perplexity": {**summarise(perplexities), "sampling_stderr": None},
            "byte_perplexity": {**summarise([math.log(p) for p in perplexities]), "sampling_stderr": None},
        },
        "transform_report": {"histogram": {"0:bitflip:*": {"linear": 28}}} if transform else {},
    }


def sealed(root: Path, stage: str, name: str, settings: dict[str, Any], inputs: dict[str, Path], out: Path) -> Path:
    """Publish the folder `out` as the artifact `stage/name`."""
    spec = {
        "stage": stage,
        "settings": settings,
        "inputs": {
            role: {"id": path.name, "stage": path.parent.name, "fingerprint": ""} for role, path in inputs.items()
        },
        "fingerprint": fingerprint([stage, name]),
    }
    publish(out, root / stage / name, spec)
    return root / stage / name


class Store:
    """Builds artifacts below `root`."""

    def __init__(self, root: Path) -> None:
        self.root, self.inputs = root, {}

    def _out(self) -> Path:
        out = self.root / "out"
        out.mkdir(parents=True)
        return out

    def train(self, experiment: str, transform: list[dict[str, Any]], floor: float) -> None:
        out = self._out()
        lines = [
            {"step": s, "tokens": s * 2048, "seconds": s / 9, "loss": floor + 6.2 * math.exp(-s / 60)}
            for s in range(5, 505, 5)
        ]
        write_bytes(out / "log" / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
        result = {"steps": 500, "tokens": 1_024_000, "parameters": 1_344_128, "final_train_loss": floor}
        write_json(out / "train.json", {"result": result, "provenance": {}})
        settings = {
            "model": {"family": "llama", "layers": 4, "dim": 128},
            "recipe": {"type": "pretrain"},
            "transform": transform,
            "seed": 0,
        }
        self.inputs[f"train:{experiment}"] = sealed(self.root, "train", experiment, settings, {}, out)

    def result(self, experiment: str, trained: str, clean: float, faulty: list[float]) -> None:
        out = self._out()
        value: dict[str, Any] = {"task": TASK, "clean": arm([clean], [], [])}
        if faulty:
            value["transformed"] = arm(faulty, [BITFLIP], list(range(len(faulty))))
        arms = {name: {"seconds": {"x": 1.25}, "device": "cpu"} for name in value if name != "task"}
        provenance = {
            "arms": arms, "commit": "0123456789abcdef" * 2, "started": "2026-01-02T03:04:05+00:00",
            "hardware": {"processor": "A processor", "gpus": []}, "versions": {"python": "3.11", "torch": "2.13.0"},
        }  # fmt: skip
        write_json(out / "result.json", {"result": value, "provenance": provenance})
        behind = {"train": self.inputs[f"train:{trained}"]}
        name = f"{experiment}-pydocs"
        self.inputs[f"result:{experiment}:pydocs"] = sealed(self.root, "result", name, {}, behind, out)

    def table(self, name: str, settings: dict[str, Any]) -> None:
        out = self._out()
        inputs = {exp: self.inputs[f"result:{exp}:pydocs"] for row in settings["cells"] for exp in row}
        table.run(Job("table", name, "f" * 64, settings, inputs, self.root / "work", out))
        self.inputs[f"table:{name}"] = sealed(self.root, "table", name, settings, {}, out)

    def comparison(self, name: str, arms: list[str], column: str) -> None:
        """Arms at seeds 3, 4, 5; each 0.5 nats better than the one before."""
        settings = {
            "arms": arms, "columns": [column], "seeds": [3, 4, 5], "level": 0.05,
            "measures": [{"task": "held-out", "metric": "loss", "delta": 0.1}],
        }  # fmt: skip
        inputs, out = {}, self._out()
        said = {"higher_is_better": {"": {"loss": False}}}
        for a in range(len(arms)):
            for s in range(3):
                cell, losses = f"0.{a}.{s}", [5.0 - 0.5 * a + 0.01 * (s + a * s % 2)]
                one = {"task": {"type": "validate", "average": "targets"}, "conditions": said}
                one |= {"metrics": {"loss": {**summarise(losses), "sampling_stderr": None}}}
                inputs[f"result:{cell}.0"] = self.root / "cells" / f"result-{cell}"
                write_json(inputs[f"result:{cell}.0"] / "result.json", {"result": {"clean": one}})
                trained = self.root / "out-of-a-cell"
                rows = [{"kind": "train", "layers": 4, "sequences": 1234, "charged": True}]
                write_json(trained / "train.json", {"result": {"steps": 77, "work": rows}})
                lines = [{"loss": 6.0 - x, "spent": x, "valid_loss": 6.0 - x - a} for x in (0.5, 1.0)]
                log = "".join(json.dumps(line) + "\n" for line in lines)
                write_bytes(trained / "log" / "metrics.jsonl", log.encode())
                methods = [{"type": "sophia-g", "hessian": "published"}] if a else []
                recipe = {"recipe": {"type": "cram", "methods": methods}}
                inputs[f"train:{cell}"] = sealed(self.root, "train", f"cell-{cell}", recipe, {}, trained)
        table.run(Job("table", name, "f" * 64, settings, inputs, self.root / "work", out))
        self.inputs[f"comparison:{name}"] = sealed(self.root, "table", f"compared-{name}", settings, {}, out)

    def sweep(self, name: str, columns: list[str], points: list[tuple[list[Any], list[float]]]) -> None:
        inputs, out = {}, self._out()
        for index, (_, values) in enumerate(points):
            folder = inputs[f"{index:05}"] = self.root / "evaluate" / f"{name}-{index}"
            write_json(folder / "result.json", {"result": arm(values, [BITFLIP], list(range(len(values))))})
        settings = {"columns": columns, "rows": [values for values, _ in points], "metrics": None}
        sweep.run(Job("sweep", name, "f" * 64, settings, inputs, self.root / "work", out))
        self.inputs[f"sweep:{name}"] = sealed(self.root, "sweep", name, settings, {}, out)


GRID = {
    "metric": "word_perplexity",
    "rows": ["trained without flips", "trained with flips"],
    "columns": ["evaluated without flips", "evaluated with flips"],
    "cells": [["plain-nano", "plain-flipped"], ["bitflip-clean", "bitflip-nano"]],
}


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Artifacts of a whole demo."""
    store = Store(tmp_path_factory.mktemp("store"))
    store.train("plain-nano", [], 3.1)
    store.train("bitflip-nano", [BITFLIP], 3.3)
    store.result("plain-nano", "plain-nano", 412.7, [])
    store.result("plain-flipped", "plain-nano", 412.7, [2950.0, 2811.0, 3102.5, 2890.0, 3011.0])
    store.result("bitflip-clean", "bitflip-nano", 455.2, [])
    store.result("bitflip-nano", "bitflip-nano", 455.2, [602.0, 597.5, 611.0, 608.3, 599.9])
    store.table("demo", GRID)
    store.comparison("methods", ["baseline", "curved"], "6 h")
    p = [0.0, *(2.0**-k for k in range(14, 6, -1))]
    store.sweep("p-frac", ["transform.bitflip.weight.p_frac"], [([v], [412 + v * 2e5, 413 + v * 2.1e5]) for v in p])
    grid = [([x, w], [412 * (1 + 900 * x + 400 * w) ** 1.6] * 2) for x in p[::2] for w in p[::2]]
    store.sweep("p-both", ["transform.bitflip.input.p_frac", "transform.bitflip.weight.p_frac"], grid)
    return store
