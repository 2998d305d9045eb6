"""What a stage gets to work with."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline_lib.artifacts.files import read_json, write_json


@dataclass(frozen=True)
class Job:
    """One run of one stage.

    Attributes:
        stage: the stage's name.
        label: readable name of the artifact, a function of its settings.
        fingerprint: SHA-256 (hex) of the spec.
        settings: the semantic settings, from the frozen spec.
        inputs: directories of the upstream artifacts, verified before the stage starts.
        work: the stage's own directory; survives kills, so that the stage can resume from it.
        out: an empty directory; what the stage leaves here is published when it returns.
            Files below `out/log/` are kept but never compared (timings, metrics, traces).
        execution: how to run (GPUs, micro-batch, logging, tracking); never changes the result.
    """

    stage: str
    label: str
    fingerprint: str
    settings: dict[str, Any]
    inputs: dict[str, Path]
    work: Path
    out: Path
    execution: dict[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write the job for a worker process."""
        values = {**vars(self), "inputs": {k: str(v) for k, v in self.inputs.items()}}
        write_json(path, {**values, "work": str(self.work), "out": str(self.out)})

    @staticmethod
    def load(path: Path) -> Job:
        """Read what `save` wrote."""
        values = read_json(path)
        inputs = {k: Path(v) for k, v in values.pop("inputs").items()}
        return Job(**{**values, "inputs": inputs, "work": Path(values["work"]), "out": Path(values["out"])})
