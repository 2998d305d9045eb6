"""Pays for each step four times and takes it once: as if the budget were a quarter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pipeline_lib.config.base import Settings as Base

if TYPE_CHECKING:
    from pipeline_lib.artifacts.job import Job
    from pipeline_lib.training.methods import Method


WASTED = 3


class Settings(Base):
    """None."""

    type: Literal["planted-worse"] = "planted-worse"


def method(settings: Settings, job: Job) -> Method:
    """The method."""
    from pipeline_lib.training.methods import Method

    class Planted(Method):
        def before_step(self, step: int) -> None:
            self.cram.work.add("train", self.cram.depth, WASTED * self.cram.settings.global_batch)

    return Planted(settings, job)


def refuses(settings: Settings, recipe: Any, model: Any) -> str | None:
    """Nothing."""
    return None
