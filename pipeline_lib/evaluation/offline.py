"""Evaluation without a network: hub repositories served to `datasets` from local folders."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

VARIABLES = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1"}


def go_offline() -> None:
    """Forbid the Hugging Face libraries the network, whether they are imported already or not."""
    os.environ.update(VARIABLES)
    for module, flag in (("huggingface_hub.constants", "HF_HUB_OFFLINE"), ("datasets.config", "HF_HUB_OFFLINE")):
        if module in sys.modules:
            setattr(sys.modules[module], flag, True)


def link_tree(source: Path, target: Path) -> None:
    """Make `target` a tree of folders like `source` whose files are links to it."""
    for path in sorted(source.rglob("*")):
        if path.is_file():
            link = target / path.relative_to(source)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path.resolve())


@contextlib.contextmanager
def serving(mirror: Path, cache: Path) -> Iterator[None]:
    """Let `datasets.load_dataset("owner/name")` find `<mirror>/owner/name`, and cache in `cache`.

    A dataset id is also a relative path, and `datasets` prefers a folder of that name: so the working directory
    is the mirror for as long as data are loaded.
    """
    import datasets.config

    mirror.mkdir(parents=True, exist_ok=True)
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = cache.resolve()
    try:
        with contextlib.chdir(mirror):
            yield
    finally:
        datasets.config.HF_DATASETS_CACHE = before


def build_mirror(mirror: Path, repositories: Mapping[str, Path]) -> None:
    """Fill `mirror` with links: repository or dataset name → folder of its files."""
    for name, folder in repositories.items():
        link_tree(folder, mirror / name)
