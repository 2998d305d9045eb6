"""Evaluation of a checkpoint under transforms: one arm, or many settings in one process."""

from __future__ import annotations

import copy
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline_lib.artifacts.files import sha256_file
from pipeline_lib.artifacts.locks import is_held, try_hold
from pipeline_lib.artifacts.progress import Progress
from pipeline_lib.artifacts.store import SEAL, read_seal
from pipeline_lib.config.fingerprint import canonical, fingerprint
from pipeline_lib.config.registry import TASK_TYPES
from pipeline_lib.evaluation.base import Outcome, Subject, Task
from pipeline_lib.evaluation.notes import Notes
from pipeline_lib.evaluation.offline import go_offline
from pipeline_lib.evaluation.statistics import summarise

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_BATCH_SIZE = 8
LOCK = ".lock"  # held while the process lives


@dataclass(frozen=True)
class Arm:
    """An evaluated arm.

    Attributes:
        result: what is compared: metrics, the settings they belong to, what the transform replaced.
        provenance: timings, device, and the evaluator's own date, time and host fields.
        evaluator: {fault seed or "clean": the evaluator's JSON, verbatim but for those fields}.
        records: {fault seed or "clean": what the run left beside its metrics}; only of tasks that leave any.
        files: {"<fault seed or clean>/<name>": text}, for the artifact's log/.
    """

    result: dict[str, Any]
    provenance: dict[str, Any]
    evaluator: dict[str, dict[str, Any]]
    records: dict[str, list[dict[str, Any]]]
    files: dict[str, str]


@cache
def shared_session() -> Session:
    """The session of this process."""
    return Session()


def _scratch() -> tempfile.TemporaryDirectory[str]:
    """A folder for this process, after those of processes that were killed have been removed."""
    for left in Path(tempfile.gettempdir()).glob("errata-evaluate-*"):
        if (left / LOCK).exists() and not is_held(left / LOCK):
            shutil.rmtree(left, ignore_errors=True)
    made = tempfile.TemporaryDirectory(prefix="errata-evaluate-")
    # Held before it has its name: a process that begins at the same moment would find it free and remove the folder.
    unnamed = Path(made.name) / f"{LOCK}-{os.getpid()}"
    try_hold(unnamed)
    unnamed.rename(Path(made.name) / LOCK)
    return made


class Session:
    """Evaluates arms one after the other and keeps the last checkpoint and all task data in memory."""

    def __init__(self) -> None:
        go_offline()
        self._checkpoint: _Checkpoint | None = None
        self._tasks: dict[str, Task] = {}
        # Datasets are memory-mapped from here, so it lives as long as they do.
        self._scratch = _scratch()

    def evaluate(
        self, settings: Mapping[str, Any], inputs: Mapping[str, Path], work: Path | None, execution: Mapping[str, Any]
    ) -> Arm:
        """One arm: the checkpoint under `settings.transform`, once for every fault seed.

        Args:
            settings: of the stage `evaluate`: task, transform, fault_seeds, seed, dtype.
            inputs: checkpoint, what the task needs, and `clean` where it compares with the clean arm.
            work: keeps finished seeds, to go on from after a kill.
            execution: `eval_batch_size`, `threads`; change speed only.
        """
        task = self._task(settings["task"], inputs)
        checkpoint = self._load(inputs["checkpoint"], settings["dtype"], execution)
        transform = settings["transform"]
        seeds: list[int | None] = list(settings["fault_seeds"]) or [0] if transform else [None]
        batch_size = int(execution.get("eval_batch_size") or DEFAULT_BATCH_SIZE)
        notes = Notes(work, fingerprint({"settings": dict(settings), "inputs": _identities(inputs)}))
        outcomes: dict[str, Outcome] = {}
        seconds: dict[str, float] = {}
        with checkpoint.under(transform) as model, Progress("evaluate", len(seeds), "runs") as progress:
            for seed in seeds:
                key, start = "clean" if seed is None else f"seed-{seed}", time.monotonic()
                found = notes.read(key)
                if found is None:
                    once = partial(notes.once, key)
                    subject = Subject(model.module, checkpoint.tokenizer, model.at(seed), batch_size, once)
                    found = task.run(subject, settings["seed"])
                    notes.write(key, found)
                outcomes[key], seconds[key] = found, round(time.monotonic() - start, 3)
                progress.update()
            report = model.report
        # The clean arm is no condition of a comparison with itself: its own weights and data are among the others.
        compared = {role: path for role, path in inputs.items() if role != "clean"}
        result = _result(settings, _identities(compared), outcomes, report)
        provenance = {
            "seconds": seconds,
            "device": str(checkpoint.device),
            "batch_size": batch_size,
            "evaluator": {key: outcome.host for key, outcome in outcomes.items()},
        }
        files = {f"{key}/{name}": text for key, outcome in outcomes.items() for name, text in outcome.files.items()}
        return Arm(
            result,
            provenance,
            {key: outcome.record for key, outcome in outcomes.items() if outcome.record},
            {key: outcome.records for key, outcome in outcomes.items() if outcome.records},
            files,
        )

    def _task(self, settings: Mapping[str, Any], inputs: Mapping[str, Path]) -> Task:
        folders = {role: str(path.resolve()) for role, path in inputs.items() if role != "checkpoint"}
        key = canonical({"task": dict(settings), "inputs": folders})
        if key not in self._tasks:
            scratch = Path(tempfile.mkdtemp(dir=self._scratch.name))  # anew: an attempt that failed left its own
            module = TASK_TYPES.load(settings["type"], "task.type")
            self._tasks[key] = module.open_task(settings, inputs, scratch)
        return self._tasks[key]

    def _load(self, artifact: Path, dtype: str, execution: Mapping[str, Any]) -> _Checkpoint:
        import torch
        from transformers.utils import logging as transformers_logging

        if not sys.stderr.isatty():
            transformers_logging.disable_progress_bar()
        if execution.get("threads"):
            torch.set_num_threads(int(execution["threads"]))
        key = (artifact.resolve(), dtype)
        if self._checkpoint is None or self._checkpoint.key != key:
            self._checkpoint = None  # frees the last one before the next is loaded
            self._checkpoint = _Checkpoint(artifact, dtype)
        return self._checkpoint


class _Checkpoint:
    """Weights as they lie on disk, on the device of the evaluation."""

    def __init__(self, artifact: Path, dtype: str) -> None:
        import torch

        from pipeline_lib.models.checkpoint import checkpoint_directory, load_model, load_tokenizer, load_transform

        directory = checkpoint_directory(artifact)
        self.key = (artifact.resolve(), dtype)
        self.device: torch.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model: Any = load_model(directory, dtype).to(self.device)  # type: ignore[arg-type]
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(directory)
        _, self.added = load_transform(directory)
        self.packed = directory / "packed"

    def under(self, transform: list[dict[str, Any]]) -> _Transformed:
        """The model under a transform; the weights themselves are shared, not copied."""
        return _Transformed(self, transform)


class _Transformed:
    """A copy of a checkpoint's modules on the same weights, so that no arm leaves anything behind for the next."""

    def __init__(self, checkpoint: _Checkpoint, transform: list[dict[str, Any]]) -> None:
        self._parameters: list[torch.Tensor] = list(checkpoint.model.parameters())
        self._versions = [parameter._version for parameter in self._parameters]
        memo: dict[int, Any] = {id(parameter): parameter for parameter in self._parameters}
        self.module: PreTrainedModel = copy.deepcopy(checkpoint.model, memo)
        self.report: dict[str, Any] = {}
        self._context = None
        if transform:
            from pipeline_lib.transforms.apply import apply
            from pipeline_lib.transforms.packed import drop_latent, pack_for
            from pipeline_lib.transforms.state import load_transform_state, transform_state

            applied = apply(self.module, transform, seed=0)
            self._context, self.report = applied.context, applied.report
            if checkpoint.added and transform_state(self.module):
                load_transform_state(self.module, checkpoint.added)
            pack_for(applied, checkpoint.packed)
            drop_latent(applied)  # of this copy: its size is that of packed weights

    def at(self, seed: int | None) -> Any:
        """The fault context, on the streams of a seed; None without a transform."""
        if self._context is not None and seed is not None:
            self._context.reseed(seed)
        return self._context

    def __enter__(self) -> _Transformed:
        return self

    def __exit__(self, *_: object) -> None:
        if [parameter._version for parameter in self._parameters] != self._versions:
            raise RuntimeError("a transform wrote to the weights of the checkpoint it was evaluated on")


def _identities(inputs: Mapping[str, Path]) -> dict[str, str]:
    """What each input is: its artifact's fingerprint; of a folder that is no artifact, a hash of its files."""
    return {role: _identity(path.resolve()) for role, path in sorted(inputs.items())}


@cache
def _identity(path: Path) -> str:
    if (path / SEAL).exists():
        return read_seal(path)["spec"]["fingerprint"]
    files = {file.relative_to(path).as_posix(): sha256_file(file) for file in path.rglob("*") if file.is_file()}
    return fingerprint(files)


def _values(name: str, runs: list[Outcome]) -> list[float]:
    """One value a fault seed; of a single run, those of the task's own seeds, where it has any."""
    own = runs[0].repeats.get(name) if len(runs) == 1 else None
    return own or [run.metrics[name] for run in runs]


def _result(
    settings: Mapping[str, Any], inputs: dict[str, str], outcomes: dict[str, Outcome], report: dict[str, Any]
) -> dict[str, Any]:
    runs = list(outcomes.values())
    first = runs[0]
    if any((run.n_samples, run.conditions) != (first.n_samples, first.conditions) for run in runs):
        raise RuntimeError("the runs of one arm saw different requests")
    metrics = {}
    for name in first.metrics:
        sampling = [run.sampling_stderr[name] for run in runs if name in run.sampling_stderr]
        metrics[name] = {
            **summarise(_values(name, runs)),
            "sampling_stderr": sum(sampling) / len(sampling) if sampling else None,
        }
    return {
        "task": dict(settings["task"]),
        "transform": settings["transform"],
        "fault_seeds": [] if "clean" in outcomes else [int(key.removeprefix("seed-")) for key in outcomes],
        "seed": settings["seed"],
        "dtype": settings["dtype"],
        "inputs": inputs,
        "n_samples": first.n_samples,
        "conditions": first.conditions,
        "metrics": metrics,
        "transform_report": report,
    }
