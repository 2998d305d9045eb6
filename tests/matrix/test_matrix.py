"""Every registered transform (and each declared composition) × recipe × model family.

Plan, 3 steps, kill, resume, export, reload, evaluate. A combination that makes no sense is declared by its recipe
(or its task), counted and printed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline_lib.artifacts.digest import compared_files
from pipeline_lib.artifacts.files import read_json
from pipeline_lib.config.errors import UserError
from pipeline_lib.config.experiments import Experiments
from pipeline_lib.config.load import load_config
from pipeline_lib.config.nodes import Node
from pipeline_lib.config.plan import Plan
from pipeline_lib.config.registry import TRANSFORMS, Registry
from pipeline_lib.config.schema import Config
from tests.matrix import cells as listed
from tests.matrix.bench import Bench
from tests.matrix.cells import STEPS, TASK, Cell, cells, config, experiment, method_cells

pytestmark = pytest.mark.slow

Count = Callable[[str, Any], None]
SENSIBLE = [cell for cell in cells() if not cell.reason]
REFUSED = [cell for cell in cells() if cell.reason]
METHODS = [cell for cell in method_cells() if cell.family in ("llama", "bert")]


def open_bench(root: Path, chosen: list[Cell], path: str = "") -> Iterator[Bench]:
    """A bench, closed at the end; the working directory is put back."""
    before = Path.cwd()
    bench = Bench(root, chosen, path)
    try:
        yield bench
    finally:
        os.chdir(before)
        bench.close()


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    yield from open_bench(tmp_path_factory.mktemp("matrix"), SENSIBLE + METHODS)


@pytest.mark.parametrize("cell", SENSIBLE, ids=lambda cell: cell.name)
def test_cell(cell: Cell, bench: Bench, record_property: Count) -> None:
    run_cell(cell, bench, record_property)


def run_cell(cell: Cell, bench: Bench, count: Count) -> None:
    """All stages of a cell."""
    checkpoint = bench.checkpoint(cell)
    exported = bench.make(checkpoint)
    source = checkpoint if "train" in checkpoint.inputs else checkpoint.inputs["init"]  # calibrated, not trained
    trained = source.inputs["train"]
    own = cell.module.ENGINE is not None  # else the weights are those of the base
    transform = bench.plan.resolver.experiments.get(cell.name).transform
    assert [settings["type"] for settings in transform] == cell.types
    assert trained.settings["transform"] == (transform if own else [])
    if own:
        assert_survives_a_kill(cell, bench, trained)
    arguments = {"convert_artifact": str(exported), "train_artifact": None, "transform": transform}
    if own:
        arguments["train_artifact"] = str(bench.root / "whole" / trained.path)
    assert bench.ask("reload", log="reload.log", **arguments) == 0, (bench.root / "reload.log").read_text()[-4000:]
    evaluate(cell, bench, count)
    count("run", cell.name)


@pytest.mark.parametrize("cell", METHODS, ids=lambda cell: cell.name)
def test_a_method(cell: Cell, bench: Bench, record_property: Count) -> None:
    """Trained, killed and resumed; its weights are exported and evaluated as any other's."""
    trained = bench.checkpoint(cell).inputs["train"]
    bench.make(trained)
    assert_survives_a_kill(cell, bench, trained)
    record_property("run", cell.name)


def test_every_method_is_planned_with_every_transform_and_family() -> None:
    """What the recipe refuses of them it refuses without a method, too."""
    every = sorted({cell.transform for cell in cells()})
    planned = [cell for cell in method_cells(every) if not cell.reason]
    assert len(planned) > 100
    resolver = Plan(Config(**config(planned))).resolver
    for cell in planned:
        method = resolver.experiments.get(cell.name).recipe.semantic()["methods"]
        assert [one["type"] for one in method] == [cell.variant]
        assert [one["type"] for one in resolver.experiments.get(cell.name).transform] == cell.types


def assert_survives_a_kill(cell: Cell, bench: Bench, trained: Node) -> None:
    """Killed after a checkpoint and resumed, a training ends in the same bytes."""
    whole = bench.root / "whole" / trained.path
    result = read_json(whole / "train.json")["result"]
    assert result["steps"] == STEPS
    assert bool(result["transform_report"]["layers"]) == bool(cell.types)
    killed, before, after = bench.kill_and_resume(trained, cell.kill_after)
    assert before == list(range(1, cell.kill_after + 1))
    assert after == list(range(cell.kill_after + 1, STEPS + 1)), "it went on, it did not begin again"
    assert "model.safetensors" in compared_files(whole)
    assert compared_files(killed) == compared_files(whole)


def evaluate(cell: Cell, bench: Bench, count: Count) -> None:
    """Both arms of a few samples; or the task's reason why it cannot evaluate this family."""
    module, settings = bench.plan.resolver.task(TASK)
    reason = module.refuses(settings, cell.family)
    if reason:
        with pytest.raises(UserError, match="cannot evaluate model") as caught:
            bench.result(cell)
        assert reason in str(caught.value)
        count("refused", f"evaluation of {cell.name} at {TASK}: {reason}")
        return
    made = bench.make(bench.result(cell))
    result = read_json(made / "result.json")["result"]
    arms = {"clean", "transformed"} if cell.types else {"clean"}
    assert {name for name in result if name in ("clean", "transformed")} == arms
    for arm in arms:
        assert result[arm]["n_samples"] == 2
        assert result[arm]["metrics"]
    for figures in result["clean"]["metrics"].values():
        assert math.isfinite(figures["mean"])


@pytest.mark.parametrize("cell", REFUSED, ids=lambda cell: cell.name)
def test_refused_cell(cell: Cell, record_property: Count) -> None:
    """Its reason is what the user reads while planning."""
    given = config([])
    experiments = Experiments(Config(**{**given, "experiments": {**given["experiments"], cell.name: experiment(cell)}}))
    with pytest.raises(UserError) as caught:
        experiments.get(cell.name)
    reason = str(cell.reason)
    assert reason.removeprefix("not built yet: ") in str(caught.value)
    record_property("refused", f"{cell.name}: {reason}")


def test_every_registered_transform_is_in_the_matrix() -> None:
    types = {kind for cell in SENSIBLE for kind in cell.types}
    assert types == set(TRANSFORMS.names())
    assert {cell.transform for cell in cells()} >= {"plain", *load_config(listed.ROOT / "config.yaml").transforms}


# -- a transform that nobody here has heard of -------------------------------------------------------------------------

STORE = '''
"""8-bit codes with a scale for each row."""

from typing import Literal

from pipeline_lib.config.base import Settings as Base
from pipeline_lib.transforms.base import ROLES, Store, Transform
from pipeline_lib.transforms.patterns import SitePatterns


class Settings(Base):
    type: Literal["codes"] = "codes"
    sites: SitePatterns = {"*.layer*.*": {}}


class Codes(Store):
    parts, exposed = ("codes", "scale"), ("codes",)
    roles = frozenset(["weight"])

    def encode(self, value, role):
        import torch

        scale = value.abs().amax(-1, keepdim=True).clamp(min=1e-6)
        return {"codes": (value / scale * 127).round().to(torch.int8), "scale": scale}

    def decode(self, stored, role):
        return stored["codes"] * stored["scale"] / 127


class Coded(Transform):
    kinds = frozenset(["linear"])

    def store(self, site):
        return Codes()


def build(settings):
    return Coded(settings)
'''


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package with the transform `codes`, found by its entry point; the folder that holds it."""
    (tmp_path / "coded_package.py").write_text(STORE)
    about = tmp_path / "coded_package-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: coded-package\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[errata.transforms]\ncodes = coded_package\n")
    monkeypatch.syspath_prepend(tmp_path)
    fresh = Registry(TRANSFORMS.kind, TRANSFORMS.package, TRANSFORMS.group, packages_only=True)
    monkeypatch.setitem(vars(TRANSFORMS), "_paths", fresh._paths)
    return str(tmp_path)


def test_a_new_transform_and_composition_are_picked_up(
    installed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Installing a package and composing its transform in config.yaml is all; flips then hit its int8 codes."""
    monkeypatch.setattr(listed, "compositions", lambda: ["codes+bitflip"])
    new = [cell for cell in cells() if "codes" in cell.types]
    assert {cell.transform for cell in new} == {"codes", "codes+bitflip"}
    assert len(new) == 2 * sum(cell.transform == "plain" for cell in cells()), "with every recipe, variant and family"
    [chosen] = [cell for cell in new if cell.name == "cram.bert.codes+bitflip"]
    for bench in open_bench(tmp_path / "bench", [chosen], path=installed):
        run_cell(chosen, bench, lambda key, value: None)
        report = read_json(bench.root / "whole" / bench.checkpoint(chosen).inputs["train"].path / "train.json")
        [both] = {tuple(kinds) for kinds in report["result"]["transform_report"]["layers"].values()}
        assert [kind.split(":")[1] for kind in both] == ["codes", "bitflip"]


def test_compositions_are_those_of_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`a+b` in an experiment of config.yaml becomes a column of the matrix."""
    text = (listed.ROOT / "config.yaml").read_text()
    text = text.replace("transforms:\n", "transforms:\n  wire: {type: bitflip, input: {p: 1.0e-3}}\n", 1)
    text = text.replace("experiments:\n", "experiments:\n  x: {model: nano, transform: bitflip+wire}\n", 1)
    (tmp_path / "config.yaml").write_text(text)
    monkeypatch.setattr(listed, "ROOT", tmp_path)
    assert listed.compositions() == ["bitflip+wire", "int2+bitflip"]
    assert {cell.transform for cell in cells()} >= {"plain", "bitflip", "wire", "bitflip+wire"}
