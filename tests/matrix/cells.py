"""Which cells the matrix has: read from the registries and config.yaml, so that a new plug-in needs no line here."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from pipeline_lib.config.experiments import Experiments
from pipeline_lib.config.load import load_config
from pipeline_lib.config.models import ARCHITECTURES
from pipeline_lib.config.registry import METHODS, RECIPES, TRANSFORMS
from tests.conftest import ROOT

STEPS = 3
TASK = "held-out"
DIMENSIONS = {"dim": 32, "layers": 2, "heads": 2, "kv_heads": 1, "ffn": 64}
ASKED = {"n": 8, "max_new_tokens": 4, "prompts": [{"prefix_chars": 12, "min_chars": 20}]}  # of a teacher
BUDGET = {
    "steps": STEPS,
    "global_batch": 4,
    "seq_len": 16,
    "lr": 1e-3,
    "data": ASKED,
    "rank": 4,
    "reset_every": 1,
    "reset_warmup": 0,
}
SMALL: dict[str, dict[str, Any]] = {
    "layer-stacking": {"initial_layers": 1, "at": [0.5]},
    "layer-dropping": {"group": 2},
    "selective-backprop": {"candidates": 4},
    "rho-loss": {"mega_batch": 8},
    "sophia-g": {"hessian_sequences": 4, "hessian_every": 2},
}
"""Settings of methods whose defaults are too large for it."""


@dataclass(frozen=True)
class Cell:
    """A combination. `transform`: plain, a name, or a composition a+b. `variant`: one that the recipe declares, a
    method of it, or ""."""

    recipe: str
    family: str
    transform: str
    variant: str = ""

    @property
    def name(self) -> str:
        """The experiment's name."""
        return ".".join(filter(None, (self.recipe, self.variant, self.family, self.transform)))

    @property
    def kill_after(self) -> int:
        """The checkpoint (1 or 2) after which its training is killed; alternating, and the same in every run."""
        return zlib.crc32(self.name.encode()) % 2 + 1

    @property
    def types(self) -> list[str]:
        """The types of its transforms."""
        return [presets()[name].get("type", name) for name in self.transform.split("+") if name != "plain"]

    @property
    def module(self) -> ModuleType:
        """Its recipe."""
        return RECIPES.load(self.recipe)

    @property
    def reason(self) -> str | None:
        """Why the recipe declares that it makes no sense, or None."""
        return self.module.refuses(self.family, self.types)


def presets() -> dict[str, dict[str, Any]]:
    """Transforms with their settings: those of config.yaml, and what else is registered, as it is by default."""
    listed = _listed(ROOT)
    types = {values.get("type", name) for name, values in listed.items()}
    return {**listed, **{name: {} for name in TRANSFORMS.names() if name not in types}}


@functools.cache
def _listed(root: Path) -> dict[str, dict[str, Any]]:
    return load_config(root / "config.yaml").transforms


def compositions() -> list[str]:
    """The compositions that experiments of config.yaml declare."""
    config = load_config(ROOT / "config.yaml")
    experiments = Experiments(config)
    named = [list(experiments.get(name).transform_settings) for name in config.experiments]
    return sorted({"+".join(names) for names in named if len(names) > 1})


def cells() -> list[Cell]:
    """All combinations, those that make no sense included."""
    transforms = ["plain", *sorted(set(presets()) - {"plain"}), *compositions()]
    return [
        Cell(recipe, family, transform, variant)
        for recipe in RECIPES.names()
        for variant in ("", *getattr(RECIPES.load(recipe), "VARIANTS", {}))
        for family in ARCHITECTURES
        for transform in transforms
    ]


def method_cells(transforms: Sequence[str] = ("plain",)) -> list[Cell]:
    """Every efficient-training method of recipe cram, alone."""
    return [
        Cell("cram", family, transform, method)
        for method in METHODS.names()
        for family in ARCHITECTURES
        for transform in transforms
    ]


def recipe_settings(recipe: str, variant: str = "") -> dict[str, Any]:
    """A tiny budget, as far as the recipe has one, and what makes the variant."""
    module = RECIPES.load(recipe)
    own: dict[str, Any] = {}
    if variant in METHODS.names():
        own = {"methods": [{variant: SMALL.get(variant, {})}]}
    elif variant:
        own = module.VARIANTS[variant]
    return {**{key: value for key, value in BUDGET.items() if key in module.Settings.model_fields}, **own}


def from_scratch(family: str) -> str:
    """A recipe that makes weights of a family out of nothing, for recipes that start from some."""
    for recipe in RECIPES.names():
        module = RECIPES.load(recipe)
        starts_at_nothing = module.ENGINE and not getattr(module, "NEEDS", ())
        if starts_at_nothing and not Cell(recipe, family, "plain").reason:
            return recipe
    raise LookupError(f"no recipe trains a {family} from random weights")


def experiment(cell: Cell) -> dict[str, Any]:
    """The entry of a cell in `experiments:`."""
    needs = getattr(cell.module, "NEEDS", ("from",) if cell.module.ENGINE is None else ())
    entry: dict[str, Any] = dict.fromkeys(needs, f"base.{cell.family}")
    if "from" not in entry:
        entry["model"] = cell.family
    if cell.variant in METHODS.names() and "losses" in getattr(METHODS.load(cell.variant), "NEEDS", ()):
        entry["losses"] = f"judge.{cell.family}"
    return {**entry, "transform": cell.transform, "recipe": {cell.recipe: recipe_settings(cell.recipe, cell.variant)}}


def config(chosen: list[Cell]) -> dict[str, Any]:
    """A config.yaml with an experiment for each of the chosen cells, and a trained base for each family."""
    models = {}
    for family, architecture in ARCHITECTURES.items():
        sizes = {key: value for key, value in DIMENSIONS.items() if key in architecture.model_fields}
        models[family] = {family: sizes, "tokenizer": "words", "dataset": "words"}
    bases = {}
    for family in ARCHITECTURES:
        recipe = from_scratch(family)
        entry = {"model": family, "transform": "plain", "recipe": {recipe: recipe_settings(recipe)}, "seed": 5}
        bases[f"base.{family}"] = entry
        bases[f"judge.{family}"] = {**entry, "recipe": {"cram": recipe_settings("cram")}, "dataset": "others"}
    return {
        "tokenizers": {"words": {"train": {"dataset": "words", "vocab_size": 300}}},
        "datasets": {
            "words": {"source": {"type": "local", "path": "data/*.jsonl"}, "split": {"valid": 0.2, "test": 0.2}},
            "others": {"source": {"type": "local", "path": "data/*.jsonl"}, "seed": 1},
        },
        "models": models,
        "transforms": presets(),
        "tasks": {TASK: {"type": "lm_eval", "task": "documents", "dataset": "words", "max_length": 16, "limit": 2}},
        "experiments": {**bases, **{cell.name: experiment(cell) for cell in chosen}},
        "fault_seeds": 2,
        "run": {"checkpoint_every": 1, "log_every": 1, "gpus": 0},
        "tracking": {"wandb": "off"},
    }
