"""Any task of lm-eval by name, its own and ours (the YAML files beside this one)."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from pipeline_lib.config.base import Settings as Base
from pipeline_lib.config.errors import UserError, closest
from pipeline_lib.evaluation import offline
from pipeline_lib.evaluation.base import Outcome, Subject
from pipeline_lib.evaluation.statistics import encode_all

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

OURS = Path(__file__).parent
OWN_DATASET = "errata/dataset"  # the `dataset_path` by which a YAML of ours asks for the task's dataset
HOST_FIELDS = ("date", "git_hash", "upper_git_hash", "pretty_env_info")


class HubFiles(Base):
    """Files of a hub repository that the task reads."""

    repo: str = Field(description="hub repository: owner/name")
    repo_type: Literal["dataset", "model"] = Field("dataset", description="dataset or model")
    revision: str = Field("main", description="branch, tag or commit")
    patterns: list[str] | None = Field(None, description="globs of the files to fetch; null = all")


class Settings(Base):
    """An lm-eval task and what it needs."""

    type: Literal["lm_eval"] = "lm_eval"
    task: str = Field(description="name of an lm-eval task, group or tag, or of one of ours: documents, pydocs")
    dataset: str | None = Field(None, description="one of our datasets, whose test split the task evaluates")
    hub: list[HubFiles] = Field([], description="hub files the task reads: [{repo, repo_type, revision, patterns}]")
    num_fewshot: int | None = Field(None, ge=0, description="examples in the prompt; null = the task's own number")
    limit: int | float | None = Field(None, gt=0, description="documents (≥ 1) or share of them (< 1); null = all")
    max_length: int | None = Field(None, ge=2, description="tokens of context; null = the model's")
    generation: dict[str, Any] = Field({}, description="generation arguments, handed to lm-eval untouched")
    chat_template: bool = Field(False, description="put prompts into the tokenizer's chat template")
    system: str | None = Field(None, description="system prompt")
    bootstrap: int = Field(1000, ge=0, description="resamples for the standard error of metrics that have no formula")

    @field_validator("task")
    @classmethod
    def _a_name(cls, value: str) -> str:
        if not value or value != value.strip() or "/" in value or value.endswith(".yaml"):
            raise ValueError(f"task must be the name of an lm-eval task, not a path: {value!r}")
        return value

    @model_validator(mode="after")
    def _data(self) -> Settings:
        ours = {path.stem for path in OURS.glob("*.yaml")}
        if self.task in ours and self.dataset is None:
            raise ValueError(f"task {self.task} needs `dataset`: the dataset whose test split it evaluates")
        if self.task not in ours and self.dataset is not None:
            raise ValueError(f"task {self.task} brings its own data; `dataset` goes with {', '.join(sorted(ours))}")
        return self

    @field_validator("limit")
    @classmethod
    def _whole(cls, value: int | float | None) -> int | float | None:
        if value is not None and value >= 1 and value != int(value):
            raise ValueError(f"limit must be a whole number of documents or a share below 1, not {value}")
        return value


def needs(settings: Settings) -> list[dict[str, Any]]:
    """The hub files that the assets stage must fetch, in the order of the inputs asset-0, asset-1, …"""
    return [files.semantic() for files in settings.hub]


def refuses(settings: Settings, model_family: str) -> str | None:
    """Why this task makes no sense for a family of models, or None."""
    return "it needs a causal language model, and an encoder is none" if model_family == "bert" else None


def open_task(settings: Mapping[str, Any], inputs: Mapping[str, Path], scratch: Path) -> LmEvalTask:
    """The task with its data loaded, without a network.

    Args:
        settings: as they stand in a spec.
        inputs: `dataset` (an artifact of the dataset stage) and `asset-0`, … where the settings name them.
        scratch: an empty folder that outlives the task.

    Raises:
        UserError: lm-eval has no such task, or its data are not among the inputs.
    """
    return LmEvalTask(Settings.model_validate(settings), inputs, scratch)


class LmEvalTask:
    """An lm-eval task (or group, or tag), ready to run on many models."""

    def __init__(self, settings: Settings, inputs: Mapping[str, Path], scratch: Path) -> None:
        self.settings = settings
        offline.go_offline()
        _prepare_lm_eval()
        offline.build_mirror(scratch / "mirror", _served(settings, inputs, scratch))
        manager, entry_name = _manager(settings.task)
        self._manager = manager
        with offline.serving(scratch / "mirror", scratch / "cache"):
            self._tasks = _load(manager, entry_name, settings)

    def run(self, subject: Subject, seed: int) -> Outcome:
        """Evaluate one model; see `Task.run`. Seed 0 is what lm-eval's own command line uses."""
        import lm_eval.evaluator
        from lm_eval.utils import handle_non_serializable

        from pipeline_lib.evaluation.sequences import SequenceLM

        settings = self.settings
        if not subject.model.can_generate() or subject.model.config.is_encoder_decoder:
            raise UserError(
                "lm-eval tasks need a causal language model",
                where=f"task {settings.task}",
                value=type(subject.model).__name__,
                fix="choose a task of another type for this model",
            )
        results: Any = lm_eval.evaluator.simple_evaluate(
            model=SequenceLM(subject, settings.max_length),
            tasks=list(self._tasks),
            task_manager=self._manager,
            batch_size=subject.batch_size,
            num_fewshot=settings.num_fewshot,
            limit=settings.limit,
            gen_kwargs=dict(settings.generation) or None,
            apply_chat_template=settings.chat_template,
            system_instruction=settings.system,
            bootstrap_iters=settings.bootstrap,
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=1234 + seed,
            torch_random_seed=1234 + seed,
            fewshot_random_seed=1234 + seed,
        )
        results = json.loads(json.dumps(results, default=handle_non_serializable))
        host = {name: results.pop(name) for name in HOST_FIELDS if name in results}
        metrics, errors = _metrics(results)
        leaves = results["n-samples"]
        return Outcome(
            metrics=metrics,
            sampling_stderr=errors,
            n_samples=sum(leaf["effective"] for leaf in leaves.values()),
            conditions={
                "versions": results["versions"],
                "num_fewshot": results["n-shot"],
                "higher_is_better": results["higher_is_better"],
                "requests": _digest(self._leaves()),
            },
            record=encode_all(results),
            host=host,
        )

    def _leaves(self) -> list[Any]:
        found = self._manager.load(list(self._tasks))
        return list(found["tasks"].values())


def _served(settings: Settings, inputs: Mapping[str, Path], scratch: Path) -> dict[str, Path]:
    """Repository name → folder of its files."""
    served = {}
    if "dataset" in inputs:
        test = sorted(inputs["dataset"].glob("test-*.parquet"))
        if not test:
            raise UserError(
                "the dataset has no test split", where=str(inputs["dataset"]), fix="give its `split` a `test`"
            )
        only_test = scratch / "test"
        for path in test:
            only_test.mkdir(parents=True, exist_ok=True)
            (only_test / path.name).symlink_to(path.resolve())
        served[OWN_DATASET] = only_test
    for index, files in enumerate(settings.hub):
        served[files.repo] = inputs[f"asset-{index}"] / "files"
    return served


def _manager(name: str) -> tuple[TaskManager, str]:
    """lm-eval's index of tasks, as little of it as holds `name`: reading all of it takes 5 s."""
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    theirs = Path(lm_eval.tasks.__file__).parent
    for folder in (OURS, theirs / name):
        if folder.is_dir():
            manager = TaskManager(include_path=str(folder), include_defaults=False)
            # A group or tag may have members elsewhere; only a task is whole in its folder.
            if name in manager.all_subtasks:
                return manager, name
    manager = TaskManager(include_path=str(OURS))
    if name not in manager.all_tasks:
        raise UserError(
            "lm-eval has no such task",
            where="tasks",
            value=name,
            allowed="the names that `lm-eval ls tasks` prints, documents, pydocs",
            fix=closest(name, manager.all_tasks) or "check the name",
        )
    return manager, name


def _load(manager: TaskManager, name: str, settings: Settings) -> list[Any]:
    """The task objects, their data loaded."""
    try:
        found = manager.load([name])
    except Exception as error:
        if not _is_missing_data(error):
            raise
        raise UserError(
            f"the data of lm-eval task {name} are not among its assets: {error}",
            where="tasks",
            value={"task": name, "dataset": settings.dataset, "hub": [files.repo for files in settings.hub]},
            fix="list the repository under `hub:` of the task (with its README.md), or name a `dataset:` of ours",
        ) from None
    groups = found.get("groups") or {}
    return [groups[name]] if name in groups else list(found["tasks"].values())


def _is_missing_data(error: BaseException) -> bool:
    from datasets.exceptions import DatasetsError

    return isinstance(error, (ConnectionError, FileNotFoundError, DatasetsError)) or "BuilderConfig" in str(error)


def _metrics(results: dict[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """({metric: value}, {metric: standard error}); of several tasks, `task/metric`."""
    values: dict[str, float] = {}
    errors: dict[str, float] = {}
    several = len(results["results"]) > 1
    for task, figures in results["results"].items():
        for key, value in figures.items():
            metric, comma, filter_name = key.partition(",")
            if not comma or isinstance(value, (str, bool)) or value is None:
                continue
            base = metric.removesuffix("_stderr")
            name = base if filter_name == "none" else f"{base}:{filter_name}"
            name = f"{task}/{name}" if several else name
            if not metric.endswith("_stderr"):
                values[name] = float(value)
            elif math.isfinite(value):
                errors[name] = float(value)
    return values, errors


def _digest(tasks: list[Any]) -> str:
    """SHA-256 over every request of the tasks: prompts, continuations, decoding arguments."""
    digest = hashlib.sha256()
    for task in tasks:
        for request in task.instances:
            line = [task.task_name, request.request_type, request.doc_id, request.idx, request.args]
            digest.update(json.dumps(line, sort_keys=True, default=str).encode())
    return digest.hexdigest()


@cache
def _prepare_lm_eval() -> None:
    """Once a process: what of lm-eval would crash, chatter or repeat itself."""
    import datasets
    import lm_eval.api.metrics
    import lm_eval.api.task
    import lm_eval.evaluator
    from torch.utils import collect_env

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    # A model full of faults can have a perplexity beyond the largest float: infinity, not a crash.
    lm_eval.api.metrics.math = SimpleNamespace(**{**vars(math), "exp": _exp})  # type: ignore[attr-defined]
    # It describes the machine by half a dozen commands, anew for every evaluation.
    collect_env.get_pretty_env_info = cache(collect_env.get_pretty_env_info)
    # It asks git for the commit of the folder it runs in, aloud outside a checkout; our provenance has the commit.
    lm_eval.evaluator.get_git_commit_hash = lambda: None
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        bar: Callable[..., Any] = partial(lm_eval.api.task.tqdm, disable=True)
        lm_eval.api.task.tqdm = bar  # type: ignore[assignment]


def _exp(value: float) -> float:
    with suppress(OverflowError):
        return math.exp(value)
    return math.inf
