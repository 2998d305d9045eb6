"""The shape of the house: layers, plug-ins without torch, file sizes, one pin list, code hashes."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import yaml

from pipeline_lib.artifacts.files import read_json
from pipeline_lib.cli.versions import LOCK, current, moved

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "pipeline_lib"

BASE = {"config", "artifacts", "numerics", "data", "models"}
# package: the packages it may import
ALLOWED = {
    "config": {"config"},
    "artifacts": {"artifacts", "config"},
    "numerics": {"numerics", "config"},
    "models": {"models", "artifacts", "config", "numerics"},
    "data": {"data", "artifacts", "config", "numerics"},
    "transforms": BASE | {"transforms"},
    "training": BASE | {"transforms", "training"},
    "evaluation": BASE | {"transforms", "evaluation"},
    "reporting": BASE | {"reporting"},
    "stages": BASE | {"transforms", "training", "evaluation", "reporting", "stages"},
    "cli": BASE | {"stages", "reporting", "cli"},
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def test_imports_point_one_way() -> None:
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        package = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if package not in ALLOWED:
            continue
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == "pipeline_lib" and len(parts) > 1 and parts[1] not in ALLOWED[package]:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong, wrong


def test_only_the_adapter_knows_torchtitan_and_only_stages_know_snakemake() -> None:
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        where = path.relative_to(PACKAGE).as_posix()
        roots = {name.split(".")[0] for name in imports(path)}
        if "torchtitan" in roots and not where.startswith("training/titan/"):
            wrong.append(f"{where}: torchtitan")
        if "snakemake" in roots and not where.startswith("stages/"):
            wrong.append(f"{where}: snakemake")
    assert not wrong, wrong


def test_planning_imports_no_torch() -> None:
    """In a fresh interpreter: the Snakefile's imports and every plug-in's settings, and then no torch."""
    code = (
        "import sys\nimport pipeline_lib.stages.wiring\n"
        "from pipeline_lib.config.registry import METHODS, RECIPES, SOURCES, TASK_TYPES, TRANSFORMS\n"
        "for registry in (TRANSFORMS, RECIPES, METHODS, SOURCES, TASK_TYPES):\n"
        "    [registry.load(name) for name in registry.names()]\n"
        "heavy = [m for m in ('torch', 'transformers', 'datasets', 'lm_eval', 'pandas') if m in sys.modules]\n"
        "sys.exit(f'imported while planning: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_files_are_short() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for folder in ("pipeline_lib", "rules", "tests", "benchmarks", "studies")
        for path in [*(ROOT / folder).rglob("*.py"), *(ROOT / folder).rglob("*.smk")]
        if (lines := len(path.read_text().splitlines())) > 400
    }
    assert not long, long


def test_every_rule_has_a_log_and_an_environment_and_no_run() -> None:
    for path in (ROOT / "rules").glob("*.smk"):
        for rule in re.split(r"^rule ", path.read_text(), flags=re.M)[1:]:
            name = rule.split(":")[0]
            assert "log:" in rule and "conda:" in rule and "shell:" in rule, name
            assert not re.search(r"^\s+(run|script|retries):", rule, flags=re.M), name


def pins() -> dict[str, str]:
    found = {}
    for line in (ROOT / "envs" / "pins.txt").read_text().splitlines():
        line = line.partition("#")[0].strip()
        if line:
            name = re.match(r"[A-Za-z0-9_.-]+", line)
            assert name, line
            found[name.group().lower()] = line
    return found


def test_environments_agree_with_the_pin_list() -> None:
    known = pins()
    for path in (ROOT / "envs").glob("*.yaml"):
        [listed] = [
            entry["pip"] for entry in yaml.safe_load(path.read_text())["dependencies"] if isinstance(entry, dict)
        ]
        for line in listed:
            name = re.match(r"[A-Za-z0-9_.-]+", line)
            assert name and known.get(name.group().lower()) == line, f"{path.name}: {line}"


def test_every_import_is_pinned() -> None:
    aliases = {"yaml": "pyyaml", "markupsafe": "jinja2", "pydantic_core": "pydantic", "sklearn": "scikit-learn"}
    known = set(pins()) | {"pipeline_lib"}
    missing = set()
    for path in PACKAGE.rglob("*.py"):
        for name in imports(path):
            root = name.split(".")[0]
            if root not in sys.stdlib_module_names and aliases.get(root, root).lower() not in known:
                missing.add(f"{path.relative_to(ROOT)}: {root}")
    assert not missing, missing


def test_stage_versions_lock_agrees_with_the_code() -> None:
    """A stage whose code moved needs a raised version or a `same-meaning` line: see `python -m pipeline_lib versions`."""
    assert moved(read_json(ROOT / LOCK), current()) == {}


def test_nothing_names_a_private_path_or_a_token() -> None:
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    pattern = re.compile(r"hf_[A-Za-z0-9]{30,}|/home/[a-z]+/|/root/|trust_remote_code=True")
    wrong = [
        name
        for name in files
        if name != "tests/test_house.py"
        and Path(ROOT / name).suffix in {".py", ".md", ".yaml", ".smk", ".sh", ".json"}
        and pattern.search((ROOT / name).read_text())
    ]
    assert not wrong, wrong
