"""A hash of a module's code and of all our code it imports; comments and docstrings do not count."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
# Loaded by name at run time (registries), so no import statement shows them.
DYNAMIC = {
    "pipeline_lib.stages.train": ("pipeline_lib.training.recipes", "pipeline_lib.training", "pipeline_lib.transforms"),
    "pipeline_lib.stages.evaluate": ("pipeline_lib.evaluation", "pipeline_lib.transforms"),
    "pipeline_lib.stages.report": ("pipeline_lib.reporting",),
    "pipeline_lib.stages.dataset": ("pipeline_lib.data.sources",),
}


def code_hash(module: str) -> str:
    """Hex SHA-256 (16 digits) over the syntax trees of `module` and its import closure inside this package."""
    digest = hashlib.sha256()
    for name in sorted(closure(module)):
        path = _path(name)
        assert path is not None
        digest.update(name.encode() + _tree_text(path).encode())
    for package in DYNAMIC.get(module, ()):
        for path in sorted(_folder(package).rglob("*")):
            if path.suffix in (".yaml", ".j2"):  # task definitions and templates are code too
                digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def closure(module: str) -> set[str]:
    """All our modules that `module` imports, directly or not, and those it loads by name."""
    seen: set[str] = set()
    todo = [module, *(name for package in DYNAMIC.get(module, ()) for name in _members(package))]
    while todo:
        name = todo.pop()
        path = _path(name)
        if path is None or name in seen:
            continue
        seen.add(name)
        todo += [_known(target) for target in _imports(name, path)]
        todo.append(name.rpartition(".")[0])
    return seen


def _folder(package: str) -> Path:
    return PACKAGE.joinpath(*package.split(".")[1:])


def _members(package: str) -> list[str]:
    root = _folder(package)
    return [
        ".".join(["pipeline_lib", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")
        for path in root.rglob("*.py")
    ]


def _path(name: str) -> Path | None:
    if name.split(".")[0] != "pipeline_lib":
        return None
    base = PACKAGE.joinpath(*name.split(".")[1:])
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)


def _known(target: str) -> str:
    """`pipeline_lib.a.name` → `pipeline_lib.a` when `name` is no module."""
    return target if _path(target) else target.rpartition(".")[0]


def _imports(name: str, path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@lru_cache(maxsize=512)
def _tree_text(path: Path) -> str:
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        first = body[0] if isinstance(body, list) and body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            assert isinstance(body, list)
            body.pop(0)
    return ast.dump(tree)
