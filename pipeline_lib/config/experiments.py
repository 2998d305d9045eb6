"""Names in config.yaml to complete, checked experiments."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from pipeline_lib.config.base import Settings
from pipeline_lib.config.compositions import check_composition
from pipeline_lib.config.errors import UserError, closest, known
from pipeline_lib.config.load import merge
from pipeline_lib.config.registry import RECIPES, TRANSFORMS
from pipeline_lib.config.resolved import Resolved, check_complete, family_of
from pipeline_lib.config.schema import Config, Experiment, Model
from pipeline_lib.config.validate import validate

FILE = "config.yaml"


class Experiments:
    """The experiments of a configuration: those it lists, and `{transform}-{model}` for all it could."""

    def __init__(self, config: Config, file: str = FILE) -> None:
        self.config, self.file = config, file
        self._cache: dict[str, Resolved] = {}
        for name in config.transforms:
            if "-" in name or "+" in name:
                raise UserError(
                    "a transform's name may hold no '-' and no '+'",
                    where=f"{file}: transforms",
                    value=name,
                    allowed="a-z 0-9 . _",
                    fix="rename it",
                )

    def get(self, name: str, _chain: tuple[str, ...] = ()) -> Resolved:
        """The experiment `name`.

        Raises:
            UserError: unknown, or its settings are wrong or impossible together, or `from`, `teacher`
                and `losses` lead in a circle.
        """
        if name not in self._cache:
            if name in _chain:
                raise UserError(
                    "experiments start from each other in a circle",
                    where=self.where(name),
                    value=" → ".join([*_chain[_chain.index(name) :], name]),
                    fix="let one of them start from a model",
                )
            self._cache[name] = self.resolve(name, self.entry(name), (*_chain, name))
        return self._cache[name]

    def where(self, name: str) -> str:
        """File and key of an experiment."""
        return f"{self.file}: experiments.{name}" if name in self.config.experiments else f"experiment {name}"

    def entry(self, name: str) -> Experiment:
        """The entry of `name` with model and transform filled in from the name where it says nothing."""
        listed = name in self.config.experiments
        entry = self.config.experiments.get(name) or Experiment()
        implied = self._implied(name)
        if not listed and implied is None:
            raise self.unknown(name)
        if implied is None:
            return entry
        transform, model = implied
        given = entry.transform if isinstance(entry.transform, str) else "+".join(entry.transform or {}) or transform
        if (entry.model or model) != model or (given or transform) != transform:
            raise UserError(
                f"this name stands for transform {transform} on model {model}",
                where=self.where(name),
                value={"model": entry.model, "transform": given},
                allowed=f"model {model} and transform {transform}",
                fix="give the experiment another name",
            )
        filled: dict[str, Any] = {"transform": entry.transform or transform}
        if entry.from_ is None:
            filled["model"] = model
        return entry.model_copy(update=filled)

    def _implied(self, name: str) -> tuple[str, str] | None:
        transform, dash, model = name.partition("-")
        known = all(part in self.config.transforms for part in transform.split("+"))
        return (transform, model) if dash and known and model in self.config.models else None

    def unknown(self, name: str) -> UserError:
        """The error for a name that is no experiment."""
        names = [*self.config.experiments, *(f"{t}-{m}" for t in self.config.transforms for m in self.config.models)]
        return UserError(
            "unknown experiment",
            where=self.file,
            value=name,
            allowed=f"{', '.join(sorted(self.config.experiments))} and {{transform}}-{{model}} with transforms "
            f"{', '.join(self.config.transforms)} and models {', '.join(self.config.models)}",
            fix=closest(name, names) or "add it under `experiments:`",
        )

    def resolve(self, name: str, entry: Experiment, chain: tuple[str, ...]) -> Resolved:
        """`entry` with every default filled in; `chain` is the way here through `from` and its like."""
        where = self.where(name)
        for key, other in (("from", entry.from_), ("teacher", entry.teacher), ("losses", entry.losses)):
            if isinstance(other, str) and not (key == "teacher" and other in self.config.models):
                self._edge(other, f"{where}.{key}", chain)
        base = self.get(entry.from_, chain) if entry.from_ else None
        model_name = self._model_name(entry, base, where)
        model = self.config.models[model_name]
        transforms = self._transforms(entry, where)
        check_composition(family_of(model), transforms, f"{where}.transform")
        types = [settings["type"] for settings in _listed(transforms)]
        recipe_name, module, recipe = self._recipe(entry, model, base, types, where)
        refusal = module.refuses(family_of(model), types)
        if refusal:
            raise UserError(
                f"recipe {recipe_name} cannot be combined with model {model_name}: {refusal}",
                where=f"{where}.recipe",
                value=recipe_name,
                fix="choose another recipe, model or transform",
            )
        refusal = module.conflicts(recipe, model) if hasattr(module, "conflicts") else None
        if refusal:
            raise UserError(refusal, where=f"{where}.recipe.{recipe_name}", value=model_name, fix="change the recipe")
        if module.ENGINE is None and base is None and model.trained is None:
            raise UserError(
                "nothing to evaluate: recipe `none` trains no weights",
                where=f"{where}.recipe",
                value="none",
                fix="give `from:` an experiment, or another recipe",
            )
        if getattr(module, "BUILDS_MODEL", False) and model.trained is not None:
            raise UserError(
                f"recipe {recipe_name} builds its model from dimensions, and {model_name} is a checkpoint",
                where=f"{where}.recipe",
                value=recipe_name,
                fix="use finetune or none, or a model of dimensions",
            )
        check_complete(entry, module, recipe_name, recipe, bool(base or model.trained), where)
        return Resolved(
            name=name, model_name=model_name, model=model, transform=_listed(transforms), transform_settings=transforms,
            recipe_name=recipe_name, recipe=recipe, recipe_module=module,
            dataset=self._dataset(entry, model, base, where),
            from_=entry.from_, teacher=entry.teacher, losses=entry.losses, seed=entry.seed,
            tasks=self._tasks(entry, model, where), publish=entry.publish,
            run=_layered(self.config.run, model.run, entry.run),
        )  # fmt: skip

    def _edge(self, other: str, where: str, chain: tuple[str, ...]) -> None:
        if other not in self.config.experiments and self._implied(other) is None:
            error = self.unknown(other)
            raise UserError(f"no such experiment\n{error}", where=where, value=other) from None
        self.get(other, chain)

    def _model_name(self, entry: Experiment, base: Resolved | None, where: str) -> str:
        if base is not None:
            if entry.model not in (None, base.model_name):
                raise UserError(
                    f"`from` brings its model, {base.model_name}",
                    where=f"{where}.model",
                    value=entry.model,
                    fix="remove `model`",
                )
            return base.model_name
        if entry.model is None:
            raise UserError(
                "missing key",
                where=f"{where}.model",
                allowed=list(self.config.models),
                fix="add `model:` or `from:` here",
            )
        return known(entry.model, self.config.models, "models", f"{where}.model")

    def _transforms(self, entry: Experiment, where: str) -> dict[str, Settings]:
        given = entry.transform if entry.transform is not None else "plain"
        names = given.split("+") if isinstance(given, str) else list(given)
        if len(set(names)) < len(names):
            raise UserError("a transform is named twice", where=f"{where}.transform", value=given, fix="name it once")
        overrides: dict[str, dict[str, Any]] = {key: {} for key in names} if isinstance(given, str) else given
        found: dict[str, Settings] = {}
        for name, override in overrides.items():
            if name == "plain" and len(overrides) == 1:
                if override:
                    raise UserError(
                        "the plain transform has no settings",
                        where=f"{where}.transform.plain",
                        value=override,
                        fix="remove them",
                    )
                break
            preset = self.config.transforms.get(name)
            if preset is None or name == "plain":
                raise UserError(
                    "unknown transform",
                    where=f"{where}.transform",
                    value=name,
                    allowed=list(self.config.transforms),
                    fix=closest(name, self.config.transforms) or "add it under `transforms:`",
                )
            values = merge(preset, override or {})
            kind = values.get("type", name)
            module = TRANSFORMS.load(kind, f"{self.file}: transforms.{name}.type")
            place = f"{where}.transform.{name}" if override else f"{self.file}: transforms.{name}"
            found[name] = validate(module.Settings, {**values, "type": kind}, place)
        return found

    def _recipe(
        self, entry: Experiment, model: Model, base: Resolved | None, types: list[str], where: str
    ) -> tuple[str, ModuleType, Settings]:
        given = entry.recipe
        if given is None and base is not None:
            given = "none"
        if given is None:
            given = "distill" if "int2" in types else model.recipe or ("none" if model.trained else "pretrain")
        named = {given: {}} if isinstance(given, str) else given
        if len(named) != 1:
            raise UserError("an experiment has one recipe", where=f"{where}.recipe", value=list(named), fix="keep one")
        name, override = next(iter(named.items()))
        module = RECIPES.load(name, f"{where}.recipe")
        values = self.config.recipes.get(name, {})
        if isinstance(model.recipe, dict) and name in model.recipe:
            values = merge(values, model.recipe[name])
        return (
            name,
            module,
            validate(module.Settings, merge({**values, "type": name}, override or {}), f"{where}.recipe.{name}"),
        )

    def _dataset(self, entry: Experiment, model: Model, base: Resolved | None, where: str) -> str | None:
        name = entry.dataset or (base.dataset if base else None) or model.dataset
        return name if name is None else known(name, self.config.datasets, "datasets", f"{where}.dataset")

    def _tasks(self, entry: Experiment, model: Model, where: str) -> list[str]:
        tasks = entry.tasks if entry.tasks is not None else model.tasks
        return [known(task, self.config.tasks, "tasks", f"{where}.tasks") for task in tasks]


def _listed(transforms: dict[str, Settings]) -> list[dict[str, Any]]:
    return [settings.semantic() for settings in transforms.values()]


def _layered(*layers: Settings) -> dict[str, Any]:
    """The settings of the last layer that gives each."""
    merged: dict[str, Any] = {}
    for layer in layers:
        merged.update({key: value for key, value in layer.model_dump().items() if value is not None})
    return merged
