"""Runs a training stage: the recipe's engine, in this process or in several."""

from __future__ import annotations

import importlib
from types import ModuleType

from pipeline_lib.artifacts.job import Job
from pipeline_lib.config.errors import UserError
from pipeline_lib.config.registry import RECIPES
from pipeline_lib.training.settings import option
from pipeline_lib.training.signals import mark_start

ENGINES = {
    "titan": "pipeline_lib.training.titan.run",
    "hf": "pipeline_lib.training.hf",
    "loop": "pipeline_lib.training.loop",
}
"""Engine → module with `run(job)`, which every rank calls: it trains (resuming what it finds in
`job.work`) and leaves the model in `job.out`. It raises `Stopped` on all ranks alike."""


def run(job: Job) -> None:
    """Train as the job says and leave the weights in `job.out`.

    Raises:
        Stopped: asked to stop; the state is saved in `job.work`.
        UserError: settings that cannot be trained.
    """
    engine_of(job)  # an impossible job fails here, before any process is started
    mark_start()
    if option(job, "processes", 1) * option(job, "nodes", 1) > 1:
        from pipeline_lib.training.launch import launch

        launch(job)
    else:
        run_rank(job)


def run_rank(job: Job) -> None:
    """Train as this process's rank."""
    importlib.import_module(ENGINES[engine_of(job)]).run(job)


def recipe_of(job: Job) -> ModuleType:
    """The module of the job's recipe."""
    return RECIPES.load(job.settings["recipe"]["type"], where=f"{job.label}.recipe")


def engine_of(job: Job) -> str:
    """The name of the recipe's engine.

    Raises:
        UserError: the recipe trains nothing.
    """
    recipe, name = recipe_of(job), job.settings["recipe"]["type"]
    if not recipe.ENGINE:
        raise UserError(f"recipe '{name}' cannot be trained: it trains nothing", where=job.label, value=name)
    return recipe.ENGINE
