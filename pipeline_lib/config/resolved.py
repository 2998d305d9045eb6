"""An experiment with every default filled in."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

from pipeline_lib.config.base import Settings
from pipeline_lib.config.errors import UserError
from pipeline_lib.config.registry import METHODS
from pipeline_lib.config.schema import Experiment, ImportedLosses, Model


@dataclass(frozen=True)
class Resolved:
    """An experiment with every default filled in.

    Attributes:
        transform: ordered settings, each with its `type`; [] is plain.
        transform_settings: the same by preset name, as the user can override them.
        recipe: the recipe's settings before its steps are resolved.
    """

    name: str
    model_name: str
    model: Model
    transform: list[dict[str, Any]]
    transform_settings: dict[str, Settings]
    recipe_name: str
    recipe: Settings
    recipe_module: ModuleType
    dataset: str | None
    from_: str | None
    teacher: str | None
    losses: str | ImportedLosses | None
    seed: int
    tasks: list[str]
    publish: str | None
    run: dict[str, Any]

    @property
    def family(self) -> str:
        """The architecture family of its model."""
        return family_of(self.model)

    @property
    def has_random_faults(self) -> bool:
        """Whether evaluations must be repeated over fault seeds."""
        return any(getattr(settings, "random_faults", True) for settings in self.transform_settings.values())


def family_of(model: Model) -> str:
    """`llama`, `mistral` or `bert`."""
    own = model.llama or model.mistral or model.bert
    if own is not None:
        return own.family
    assert model.trained is not None  # one kind is given
    return model.trained.family


def check_complete(
    entry: Experiment, module: ModuleType, recipe: str, settings: Settings, has_weights: bool, where: str
) -> None:
    """Make sure that an experiment names what its recipe and the recipe's methods start from and learn from.

    Raises:
        UserError: it does not, or it names losses that nothing reads.
    """
    given = {"from": has_weights, "teacher": entry.teacher is not None, "losses": entry.losses is not None}
    methods = [METHODS.load(method.type) for method in getattr(settings, "methods", ())]
    needed = [key for part in (module, *methods) for key in getattr(part, "NEEDS", ())]
    if given["losses"] and "losses" not in needed:
        raise UserError(
            f"recipe {recipe} reads no losses",
            where=f"{where}.losses",
            value=entry.losses,
            fix="remove `losses`, or use the method rho-loss of recipe cram",
        )
    for key in needed:
        if not given[key]:
            raise UserError(
                f"recipe {recipe} needs {'weights to start from' if key == 'from' else f'`{key}`'}",
                where=f"{where}.{key}",
                allowed="the name of an experiment",
                fix="add `from:`, or use a hub or local model" if key == "from" else f"add `{key}:`",
            )
