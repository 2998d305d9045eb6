"""As the baseline, but with a loss that is lower by about δ."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pipeline_lib.config.base import Settings as Base

if TYPE_CHECKING:
    from pipeline_lib.artifacts.job import Job
    from pipeline_lib.training.methods import Method


class Settings(Base):
    """None."""

    type: Literal["planted-slightly-better"] = "planted-slightly-better"


def method(settings: Settings, job: Job) -> Method:
    """The method."""
    from studies.planted.walk import Walk

    return Walk(settings, job, better=True)
