"""From experiments to the nodes of the DAG: which artifact is made from which settings and inputs."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from pipeline_lib.config import calibration, losses, teachers, timing
from pipeline_lib.config.base import Settings
from pipeline_lib.config.errors import UserError, known
from pipeline_lib.config.experiments import Experiments, Resolved
from pipeline_lib.config.fingerprint import fingerprint
from pipeline_lib.config.local_models import checkpoint_files
from pipeline_lib.config.models import count_parameters
from pipeline_lib.config.names import human_count, slug
from pipeline_lib.config.nodes import Node, make_node
from pipeline_lib.config.pins import pinned
from pipeline_lib.config.registry import SOURCES, TASK_TYPES
from pipeline_lib.config.schema import Config, Experiment
from pipeline_lib.config.validate import validate

MODEL_FILES = ("*.json", "*.safetensors", "*.model", "tokenizer*", "*.jinja")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
CHAT_FILES = ("chat_template.jinja",)
# Bytes that an evaluation or a tokenizer reads of a source which trainings fetch in part.
PART_OF_A_LARGE_SOURCE = 2**30

Made = TypeVar("Made")


def once(method: Callable[..., Made]) -> Callable[..., Made]:
    """A method of `Resolver` whose answer to the same arguments is kept: a sweep asks thousands of times."""

    @functools.wraps(method)
    def kept(self: Resolver, *arguments: Any) -> Made:
        key = (method.__name__, *arguments)
        if key not in self.made:
            self.made[key] = method(self, *arguments)
        return self.made[key]

    return kept


class Resolver:
    """Makes the node of every stage of every experiment; equal work is made one node."""

    def __init__(self, config: Config, file: str = "config.yaml") -> None:
        self.config, self.file = config, file
        self.experiments = Experiments(config, file)
        self.made: dict[tuple[Any, ...], Any] = {}

    # -- data ------------------------------------------------------------------------------------------------------

    def asset(self, repo: str, revision: str, patterns: list[str] | None, repo_type: str = "model") -> Node:
        """Files of a hub repository, at the commit its branch is pinned to."""
        commit = pinned(repo_type, repo, revision)
        settings = {"kind": "hub", "repo": repo, "repo_type": repo_type, "revision": commit, "patterns": patterns}
        return make_node("assets", f"{repo}-{commit[:7]}", settings, {})

    @once
    def dataset(self, name: str, max_bytes: int | None = None) -> Node:
        """The documents of a dataset, split."""
        entry = self.config.datasets[name]
        if max_bytes is None and entry.bytes_per_token is not None:
            max_bytes = PART_OF_A_LARGE_SOURCE
        source = self._source(name)
        settings = {"source": source, "split": entry.split.semantic(), "max_bytes": max_bytes, "seed": entry.seed}
        label = slug(str(source.get("repo", source["type"]))) + (f"-{human_count(max_bytes)}b" if max_bytes else "")
        return make_node("dataset", label, settings, {})

    @once
    def _source(self, name: str) -> dict[str, Any]:
        where = f"{self.file}: datasets.{name}.source"
        given = self.config.datasets[name].source
        if "type" not in given:
            raise UserError("missing key", where=f"{where}.type", allowed=SOURCES.names(), fix="add `type:` here")
        module = SOURCES.load(given["type"], f"{where}.type")
        settings = validate(module.Settings, given, where)
        settings.check(where)
        semantic = settings.resolved().semantic()
        if "repo" in semantic and "revision" in semantic:
            semantic["revision"] = pinned("dataset", semantic["repo"], semantic["revision"])
        return semantic

    @once
    def tokenizer(self, name: str) -> Node:
        """A tokenizer, trained or from the hub."""
        entry = self.config.tokenizers[name]
        if entry.train is not None:
            inputs = {"dataset": self.dataset(entry.train.dataset)}
            train = {key: value for key, value in entry.train.semantic().items() if key != "dataset"}
            return make_node("tokenizer", f"{entry.train.kind}-{entry.train.vocab_size}", {"train": train}, inputs)
        assert entry.hub is not None
        asset = self.asset(entry.hub, entry.revision, list(TOKENIZER_FILES))
        hub = {"repo": entry.hub, "revision": asset.settings["revision"]}
        return make_node("tokenizer", entry.hub, {"hub": hub}, {"asset": asset})

    @once
    def tokens(self, dataset: str, tokenizer: Node, needed: int | None) -> Node:
        """Token shards; of a source larger than needed, only as much as `needed` tokens take."""
        per_token = self.config.datasets[dataset].bytes_per_token
        max_bytes = None
        if per_token is not None and needed is None:
            raise UserError(
                "nobody knows before the training how much text its budget takes",
                where=f"{self.file}: datasets.{dataset}.bytes_per_token",
                value=per_token,
                fix="use a dataset that is fetched whole, or a budget in steps, FLOPs, or hours of a known reference",
            )
        if per_token is not None and needed is not None:
            max_bytes = 2 ** max(20, math.ceil(math.log2(needed * per_token)))  # powers of 2: near budgets share
        data = self.dataset(dataset, max_bytes)
        return make_node(
            "tokens", f"{data.label}-{tokenizer.label}", {"max_tokens": None}, {"dataset": data, "tokenizer": tokenizer}
        )

    # -- weights ---------------------------------------------------------------------------------------------------

    def architecture(self, exp: Resolved, seq_len: int) -> dict[str, Any]:
        """The model settings of a spec."""
        model = exp.model
        own = model.llama or model.mistral or model.bert
        if model.local is not None:
            files = self.checkpoint_files(exp.model_name, MODEL_FILES)
            return {"family": "local", "content": fingerprint(files), "architecture": model.local.family}
        if own is None:
            assert model.hub is not None
            commit = pinned("model", model.hub.repo, model.hub.revision)
            return {"family": "hub", "repo": model.hub.repo, "revision": commit, "architecture": model.hub.family}
        assert model.tokenizer is not None
        known(model.tokenizer, self.config.tokenizers, "tokenizers", f"{self.file}: models.{exp.model_name}.tokenizer")
        return {**own.semantic(), "vocab": self.config.tokenizers[model.tokenizer].size, "max_seq_len": seq_len}

    def recipe(self, exp: Resolved) -> tuple[dict[str, Any], int | None]:
        """The recipe's settings with its steps resolved, and the tokens that it reads."""
        parameters = None
        if exp.model.trained is not None:
            parameters = exp.model.trained.parameters
        else:
            parameters = count_parameters(self.architecture(exp, 1))[1]
        try:
            recipe: Any = exp.recipe.resolved(parameters)  # type: ignore[attr-defined]
            return recipe.semantic(), recipe.needed_tokens(parameters)
        except ValueError as error:
            raise UserError(
                str(error),
                where=f"{self.experiments.where(exp.name)}.recipe.{exp.recipe_name}",
                fix="change the budget",
            ) from None

    def train(self, exp: Resolved) -> Node:
        """The trained weights of an experiment."""
        recipe, needed = self.recipe(exp)
        tokenizer = self.model_tokenizer(exp)
        model = self.architecture(exp, recipe["seq_len"])
        inputs = {"tokenizer": tokenizer}
        if getattr(exp.recipe_module, "READS", "tokens") == "tokens":
            inputs["tokens"] = self.tokens(self.dataset_of(exp), tokenizer, needed)
        if exp.from_ is not None:
            inputs["init"] = self.checkpoint(self.experiments.get(exp.from_))
        elif exp.model.trained is not None:
            inputs["init"] = self.model_files(exp.model_name)
        if exp.teacher is not None:
            inputs["teacher"] = teachers.records(self, exp)
            inputs["teacher-model"] = inputs["teacher"].inputs["model"]
        if getattr(getattr(exp.recipe, "budget", None), "measured", False):
            inputs["timing"] = timing.of_experiment(self, exp)
        if exp.losses is not None:
            inputs["losses"] = losses.of_sequences(self, exp, inputs["tokens"], recipe["seq_len"])
        if "init" in inputs:
            inputs |= calibration.of_training(self, exp, inputs["init"], inputs.get("teacher"))
        settings = {"model": model, "transform": exp.transform, "recipe": recipe, "seed": exp.seed}
        return make_node("train", weights_label(settings), settings, inputs, self.execution(exp))

    def timing(self, exp: Resolved) -> Node:
        """This machine's times of an experiment's passes."""
        return timing.of_experiment(self, exp)

    def dataset_of(self, exp: Resolved) -> str:
        """The name of the dataset that an experiment is trained on.

        Raises:
            UserError: it has none.
        """
        if exp.dataset is None:
            raise UserError(
                "missing key",
                where=f"{self.experiments.where(exp.name)}.dataset",
                allowed=list(self.config.datasets),
                fix="name the dataset it is trained on",
            )
        return exp.dataset

    def model_tokenizer(self, exp: Resolved) -> Node:
        """The tokenizer of an experiment's model."""
        if exp.model.tokenizer is not None:
            return self.tokenizer(exp.model.tokenizer)
        if exp.model.local is not None:
            asset = self.local_asset(exp.model_name, (*TOKENIZER_FILES, *CHAT_FILES))
            return make_node("tokenizer", asset.label, {"local": asset.settings["files"]}, {"asset": asset})
        assert exp.model.hub is not None
        hub = {"repo": exp.model.hub.repo, "revision": pinned("model", exp.model.hub.repo, exp.model.hub.revision)}
        asset = self.asset(exp.model.hub.repo, exp.model.hub.revision, [*TOKENIZER_FILES, *CHAT_FILES])
        return make_node("tokenizer", exp.model.hub.repo, {"hub": hub}, {"asset": asset})

    @once
    def checkpoint_files(self, model: str, patterns: tuple[str, ...]) -> dict[str, str]:
        """{name: SHA-256} of files of a local model."""
        local = self.config.models[model].local
        assert local is not None
        return checkpoint_files(local.path, patterns, f"{self.file}: models.{model}.local.path")

    def local_asset(self, model: str, patterns: tuple[str, ...]) -> Node:
        """Files of a local model, known by their content; where they lie is no part of what they are."""
        local, files = self.config.models[model].local, self.checkpoint_files(model, patterns)
        assert local is not None
        path = str(Path(local.path).expanduser().absolute())
        return make_node(
            "assets", local_label(fingerprint(files)), {"kind": "local", "files": files}, {}, {"path": path}
        )

    def model_files(self, name: str) -> Node:
        """The files of a hub or local model."""
        model = self.config.models[name]
        if model.local is not None:
            return self.local_asset(name, MODEL_FILES)
        assert model.hub is not None
        return self.asset(model.hub.repo, model.hub.revision, list(MODEL_FILES))

    def checkpoint(self, exp: Resolved) -> Node:
        """The Hugging Face checkpoint that an experiment is evaluated from."""
        if exp.recipe_module.ENGINE is None:
            init = self.checkpoint(self.experiments.get(exp.from_)) if exp.from_ else self.model_files(exp.model_name)
            return calibration.of_checkpoint(self, exp, init)
        train = self.train(exp)
        settings = {"model": train.settings["model"], "transform": exp.transform, "dtype": "float32"}
        settings["layout"] = getattr(exp.recipe_module, "LAYOUT", "hf")
        inputs = {"train": train, "tokenizer": train.inputs["tokenizer"]}
        return make_node("convert", train.label, settings, inputs, self.execution(exp))

    def execution(self, exp: Resolved) -> dict[str, Any]:
        """How an experiment's stages run; nothing here is fingerprinted."""
        recipe = exp.recipe.operational()
        return {
            **exp.run,
            **({"recipe": recipe} if recipe else {}),
            "experiment": exp.name,
            "tracking": {"wandb": self.config.tracking.wandb, "project": self.config.tracking.project},
        }

    # -- evaluation ------------------------------------------------------------------------------------------------

    @once
    def task(self, task: str) -> tuple[ModuleType, Settings]:
        """A task's type and settings."""
        where = f"{self.file}: tasks.{known(task, self.config.tasks, 'tasks', self.file)}"
        given = self.config.tasks[task]
        if "type" not in given:
            raise UserError("missing key", where=f"{where}.type", allowed=TASK_TYPES.names(), fix="add `type:` here")
        module = TASK_TYPES.load(given["type"], f"{where}.type")
        settings = validate(module.Settings, given, where)
        return module, settings

    def evaluate(self, exp: Resolved, task: str, transform: list[dict[str, Any]], fault_seeds: list[int]) -> Node:
        """One arm of an evaluation: a checkpoint under a transform at a task."""
        module, settings = self.task(task)
        refusal = module.refuses(settings, exp.family)
        if refusal:
            raise UserError(
                f"task {task} cannot evaluate model {exp.model_name}: {refusal}",
                where=f"{self.file}: tasks.{task}",
                value=exp.name,
                fix="choose another task or model",
            )
        checkpoint = self.checkpoint(exp)
        inputs = {"checkpoint": checkpoint}
        name = getattr(settings, "dataset", None)
        if name is None and getattr(module, "OWN_DATASET", False):
            name = self.dataset_of(exp)
        if name is not None:
            known(name, self.config.datasets, "datasets", f"{self.file}: tasks.{task}.dataset")
            inputs["dataset"] = self.dataset(name)
        for index, need in enumerate(module.needs(settings)):
            inputs[f"asset-{index}"] = self._needed(need)
        if transform and getattr(module, "REFERENCE", False):
            inputs["clean"] = self.evaluate(exp, task, [], [])
        spec = {
            "task": {**settings.semantic()},
            "transform": transform,
            "fault_seeds": fault_seeds,
            "seed": 0,
            "dtype": exp.model.dtype,
        }
        label = f"{checkpoint.label}-{task_label(settings.semantic())}-{transform_label(transform)}"
        return make_node("evaluate", label, spec, inputs, self.execution(exp))

    def _needed(self, need: dict[str, Any]) -> Node:
        """The asset that a task asks for: a file from the web by its SHA-256, or files of a hub repository."""
        if "url" in need:
            return make_node("assets", need["name"], {"kind": "url", **need}, {})
        kind = need.get("repo_type", "dataset")
        return self.asset(need["repo"], need.get("revision", "main"), need.get("patterns"), kind)

    def arms(self, exp: Resolved, task: str) -> dict[str, Node]:
        """`clean`, and `transformed` unless the transform is plain."""
        arms = {"clean": self.evaluate(exp, task, [], [])}
        if exp.transform:
            seeds = list(range(self.config.fault_seeds)) if exp.has_random_faults else [0]
            arms["transformed"] = self.evaluate(exp, task, exp.transform, seeds)
        return arms

    def result(self, exp: Resolved, task: str) -> Node:
        """The JSON of an experiment and a task."""
        arms = self.arms(exp, task)
        some = arms.get("transformed", arms["clean"])
        return make_node("result", some.label, {"task": some.settings["task"], "arms": sorted(arms)}, dict(arms))

    def variant(self, name: str, entry: Experiment) -> Resolved:
        """An experiment that is not in the file: a sweep's point."""
        return self.experiments.resolve(name, entry, (name,))


def transform_label(transform: list[dict[str, Any]]) -> str:
    """`plain`, `bitflip`, `int2+bitflip`: the types of a transform."""
    return "_".join(settings["type"] for settings in transform) or "plain"


def task_label(task: dict[str, Any]) -> str:
    """A task's own name, or its type."""
    return str(task.get("task") or task["type"])


def weights_label(settings: dict[str, Any]) -> str:
    """Recipe, transform, and the model's family and size."""
    model = settings["model"]
    if model["family"] == "hub":
        size = slug(model["repo"])
    elif model["family"] == "local":
        size = local_label(model["content"])
    else:
        size = f"{model['family']}-{human_count(count_parameters(model)[0])}"
    return f"{settings['recipe']['type']}-{transform_label(settings['transform'])}-{size}"


def local_label(content: str) -> str:
    """A local checkpoint's name, from the fingerprint of its content."""
    return f"local-{content[:6]}"
