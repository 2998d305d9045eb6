"""Every recipe of the registry, on its engine, against the conformance class."""

from __future__ import annotations

import pytest

from tests.conformance import Conformance, cases
from tests.training_bench import Bench, Case

pytestmark = pytest.mark.slow


@pytest.fixture(scope="class", params=cases(), ids=str)
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    case: Case = request.param
    return Bench(case, tmp_path_factory.mktemp(str(case)))


class TestConformance(Conformance):
    pass
