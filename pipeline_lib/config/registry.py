"""Plug-ins by folder: a new transform, recipe, method, dataset source or task type is found by its file name.

A plug-in module must import no torch at its top, so that the Snakefile can read its settings.
Packages outside Errata add their own by entry point, for example in their pyproject.toml::

    [project.entry-points."errata.transforms"]
    analog = "my_package.analog"
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import entry_points
from types import ModuleType

from pipeline_lib.config.errors import UserError, closest


@dataclass
class Registry:
    """The plug-ins of one kind: the public modules of `package` and the entry points of `group`."""

    kind: str
    package: str
    group: str
    packages_only: bool = False  # a transform is a folder; the modules beside it are machinery
    dashes: bool = False  # names are written with dashes, files with underscores
    _extra: dict[str, str] = field(default_factory=dict)

    @cached_property
    def _paths(self) -> dict[str, str]:
        package = importlib.import_module(self.package)
        found = {
            info.name.replace("_", "-") if self.dashes else info.name: f"{self.package}.{info.name}"
            for info in pkgutil.iter_modules(package.__path__)
            if not info.name.startswith("_") and (info.ispkg or not self.packages_only)
        }
        found.update({point.name: point.value for point in entry_points(group=self.group)})
        return found

    def register(self, name: str, module: str) -> None:
        """Add the plug-in `name` held by the importable `module` (for tests and notebooks)."""
        self._extra[name] = module

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted({**self._paths, **self._extra})

    def load(self, name: str, where: str = "") -> ModuleType:
        """The plug-in's module.

        Raises:
            UserError: no such plug-in.
        """
        path = self._extra.get(name) or self._paths.get(name)
        if path is None:
            raise UserError(
                f"unknown {self.kind}",
                where=where,
                value=name,
                allowed=self.names(),
                fix=closest(name, self.names()) or f"use one of the above, or add a {self.kind}",
            )
        return importlib.import_module(path)


TRANSFORMS = Registry("transform", "pipeline_lib.transforms", "errata.transforms", packages_only=True)
RECIPES = Registry("recipe", "pipeline_lib.training.recipes", "errata.recipes")
METHODS = Registry("method", "pipeline_lib.training.methods", "errata.methods", dashes=True)
SOURCES = Registry("dataset source", "pipeline_lib.data.sources", "errata.sources")
TASK_TYPES = Registry("task type", "pipeline_lib.evaluation.tasks", "errata.task_types")
