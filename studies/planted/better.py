"""Three optimizer steps for the price of one: as if the budget were three times as large."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pipeline_lib.config.base import Settings as Base

if TYPE_CHECKING:
    from pipeline_lib.artifacts.job import Job
    from pipeline_lib.training.methods import Method


FREE = 2


class Settings(Base):
    """None."""

    type: Literal["planted-better"] = "planted-better"


def method(settings: Settings, job: Job) -> Method:
    """The method."""
    from pipeline_lib.training.methods import Method
    from studies.planted.steps import free_step

    class Planted(Method):
        def after_step(self, step: int) -> None:
            for _ in range(FREE):
                free_step(self, step)

    return Planted(settings, job)


def refuses(settings: Settings, recipe: Any, model: Any) -> str | None:
    """Nothing."""
    return None
