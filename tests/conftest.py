"""Fixtures of all tests. No test uses the network beyond loopback, a GPU, or files outside the repository."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline_lib.config.registry import METHODS, RECIPES, SOURCES, TASK_TYPES, TRANSFORMS

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["WANDB_MODE"] = "disabled"

ROOT = Path(__file__).resolve().parents[1]
LONGEST = ("tests/matrix", "tests/faults", "tests/workflow", "tests/training", "tests/studies", "tests/numerics")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest comes first (a file stays with one worker), so that no worker is left alone at the end."""
    items.sort(
        key=lambda item: next((n for n, name in enumerate(LONGEST) if item.nodeid.startswith(name)), len(LONGEST))
    )


@pytest.fixture(autouse=True, scope="module")
def _process_as_it_was() -> Iterator[None]:
    """Undo what a module's tests did to the whole process: environment variables, registered plug-ins, and the hub
    libraries offline."""
    variables = dict(os.environ)
    registered = [(registry, dict(registry._extra)) for registry in (TRANSFORMS, RECIPES, METHODS, SOURCES, TASK_TYPES)]
    yield
    for registry, extra in registered:
        registry._extra = extra
    os.environ.clear()
    os.environ.update(variables)
    for module in ("huggingface_hub.constants", "datasets.config"):
        if module in sys.modules:
            sys.modules[module].HF_HUB_OFFLINE = False  # type: ignore[attr-defined]
