"""One training with faults that several tests look at."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline_lib.artifacts.job import Job
from pipeline_lib.training.titan.run import run
from tests.training.titan.jobs import FAULTS, make_inputs, make_job


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="session")
def faulty(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Job:
    job = make_job(tmp_path_factory.mktemp("faulty"), inputs, FAULTS)
    run(job)
    return job
