"""The report: complete, self-contained, escaped, and readable by a parser."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from pipeline_lib.artifacts.job import Job
from pipeline_lib.reporting.collect import collect
from pipeline_lib.reporting.html import draw, render
from pipeline_lib.reporting.numbers import Measured
from pipeline_lib.reporting.plots import metric_bars
from pipeline_lib.reporting.sweeps import SweepTable
from pipeline_lib.stages import report
from tests.reporting.conftest import GRID, Store

HOSTILE = '<script>alert("x")</script>&'


class Page(HTMLParser):
    """Tags left open, attributes that fetch, ids, and the text outside of style."""

    VOID = frozenset({"meta", "link", "br", "use"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.ids: list[str] = []
        self.words: list[str] = []
        self.scripts = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.scripts += tag == "script"
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "data", "poster", "srcset"):
                self.fetched.append(value or "")
            if name == "id":
                self.ids.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)


@pytest.fixture(scope="module")
def out(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    report.run(Job("report", "r", "f" * 64, {"title": "A title"}, store.inputs, folder / "work", folder / "out"))
    return folder / "out"


def test_the_page_is_whole_and_fetches_nothing(out: Path) -> None:
    text = (out / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert page.scripts == 0
    assert page.fetched
    assert all(target.startswith("#") or target == "data:," for target in page.fetched)
    assert not re.search(r"@import|url\((?!#)", text)
    anchors = {target[1:] for target in page.fetched if target.startswith("#")}
    assert anchors <= set(page.ids)


def test_the_page_shows_everything(out: Path) -> None:
    page = Page((out / "report.html").read_text())
    words = " ".join(" ".join(page.words).split())
    for heading in ("Comparisons", "Experiments", "Training", "Results", "Sweeps", "Provenance"):
        assert heading in words
    for fact in ("A title", "plain-flipped", "412.7", "2,953 ± 50", "603.7 ± 2.6", "n = 5", "×7.16", "1.34 M"):
        assert fact in words, fact
    assert "from plain-nano" in words  # an experiment that trains nothing names the training its weights are from
    assert "weight (p_frac 2⁻¹⁰)" in words
    assert "0123456789abcdef" in words
    for fact in (
        "5.0100 ± 0.0058",
        "better −0.497 [−0.511, −0.482]",
        "seeds 3, 4, 5",
        "power 80 %",
        "6 h curved 77.00 1,234 4,936",
    ):
        assert fact in words, fact
    for fact in ("sophia-g: hessian published as published", "decay_norms no repaired", "average targets repaired"):
        assert fact in words, fact


def test_plots_and_tables_lie_beside(out: Path) -> None:
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert {"tables/demo.csv", "tables/demo.md", "plots/training-loss.svg", "plots/training-loss.png"} <= names
    assert {"plots/task-pydocs.svg", "plots/sweep-p-frac.svg", "plots/sweep-p-both-map.svg"} <= names
    assert "plots/comparison-methods.svg" in names, "loss over what was spent"
    for path in (out / "plots").glob("*.svg"):
        root = ElementTree.fromstring(path.read_text())
        assert root.tag.endswith("svg")
        assert "var(--" not in path.read_text()  # a file stands alone
    for path in (out / "plots").glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_the_same_input_gives_the_same_bytes(out: Path, store: Store, tmp_path: Path) -> None:
    report.run(Job("report", "r", "f" * 64, {"title": "A title"}, store.inputs, tmp_path / "work", tmp_path))
    for path in sorted(out.rglob("*")):
        if path.is_file():
            assert (tmp_path / path.relative_to(out)).read_bytes() == path.read_bytes(), path


def test_names_are_escaped_everywhere(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.train("plain", [], 3.0)
    store.result("plain", "plain", 10.0, [20.0, 21.0])
    store.table("plain", {**GRID, "rows": [HOSTILE], "columns": ["x"], "cells": [["plain"]]})
    store.comparison("plain", [HOSTILE, f"{HOSTILE}!"], HOSTILE)
    store.sweep("plain", [f"transform.{HOSTILE}"], [([HOSTILE], [3.0]), (["b"], [4.0])])
    inputs = {role.replace("plain", HOSTILE, 1): path for role, path in store.inputs.items()}
    collected = collect({"title": HOSTILE}, inputs)
    pictures = draw(collected)
    text = render(collected, pictures)
    page = Page(text)
    assert page.scripts == 0
    assert page.open == []
    assert "<script" not in text
    for found in pictures.values():
        for picture in found:
            ElementTree.fromstring(picture.svg)


def test_an_empty_report_says_little(tmp_path: Path) -> None:
    collected = collect({"title": "Nothing"}, {})
    page = Page(render(collected, draw(collected)))
    assert page.open == []
    assert "Comparisons" not in " ".join(page.words)


@pytest.mark.parametrize("mean", [math.inf, math.nan, 0.0, -3.0, 1e30])
def test_bars_bear_any_number(mean: float) -> None:
    arms = {"a": {"clean": Measured(2.0, None, 1), "transformed": Measured(mean, 0.5, 3)}}
    assert "<svg" in metric_bars("m", arms, "bars").inline


def test_sweeps_of_any_shape_are_drawn(tmp_path: Path) -> None:
    from pipeline_lib.reporting.sweep_plots import sweep_pictures

    def sweep(axes: int, size: int, value: Any) -> SweepTable:
        points: list[Any] = [([i % 3] * (axes - 1) + [i], {"m": Measured(value, None, 1)}) for i in range(size)]
        return SweepTable([f"a{i}" for i in range(axes)], ["m"], points)

    for axes, size, mean, pictures in [(1, 1, 2.0, 1), (1, 4, math.inf, 1), (2, 4, math.nan, 2), (3, 20, 1.0, 2)]:
        drawn = sweep_pictures(sweep(axes, size, mean), "m", "s")
        assert len(drawn) == pictures
        for picture in drawn:
            ElementTree.fromstring(picture.svg)


def test_axes_beyond_two_are_panels_and_every_cell_is_there() -> None:
    from itertools import product

    from pipeline_lib.reporting.sweep_plots import sweep_pictures

    axes = ["transform.bitflip.weight.p", "p_frac", "operand", "layers"]
    values = product([0, 2.0**-12], [0, 0.5], ["weights", "activations"], ["attention", "mlp"])
    found: Any = [(list(point), {"ppl": Measured(100.0 + i, 0.5, 3)}) for i, point in enumerate(values)]
    heat, curves = sweep_pictures(SweepTable(axes, ["ppl"], found), "ppl", "s")
    text = " ".join(ElementTree.fromstring(heat.svg).itertext())
    assert all(f"{100 + i}" in text for i in range(16))
    for title in ("operand = weights, layers = attention", "operand = activations, layers = mlp"):
        assert title in text
        assert title in " ".join(ElementTree.fromstring(curves.svg).itertext())
    assert heat.caption == "ppl over bitflip.weight.p and p_frac, a panel for each operand and layers, linear colours."


def test_diverged_points_are_crosses_and_move_no_scale() -> None:
    from pipeline_lib.reporting.sweep_plots import sweep_pictures

    found: Any = [([rate], {"m": Measured(value, None, 1)}) for rate, value in [(1e-4, 3.0), (1e-3, 2.0), (1.0, 1e9)]]
    [curve] = sweep_pictures(SweepTable(["lr"], ["m"], found, None, [False, False, True]), "m", "s")
    text = list(ElementTree.fromstring(curve.svg).itertext())
    assert "diverged" in text
    assert curve.caption == "m over lr; whiskers are ± 1 standard error; a cross is a training that diverged."
    [clean] = sweep_pictures(SweepTable(["lr"], ["m"], found[:2]), "m", "s")
    ticks = [t for t in ElementTree.fromstring(clean.svg).itertext() if t.strip().startswith(("2.", "3."))]
    assert ticks
    assert set(ticks) <= set(text), "the axis is that of the points that did not diverge"
    both: Any = [([rate, kind], metrics) for rate, metrics in [(p[0][0], p[1]) for p in found] for kind in ("a", "b")]
    heat, _ = sweep_pictures(SweepTable(["lr", "kind"], ["m"], both, None, [False, False, True] * 2), "m", "s")
    assert list(ElementTree.fromstring(heat.svg).itertext()).count("diverged") == 2


def test_a_picture_hides_what_it_has_no_point_for() -> None:
    from pipeline_lib.reporting.sweep_plots import sweep_pictures

    points: Any = [([a, b, c], {"m": Measured(1.0 + a, None, 1)}) for a in (0, 1) for b in (0, 1) for c in (0, 1, 2)]
    [heat, _] = sweep_pictures(SweepTable(["a", "b", "c"], ["m"], points), "m", "s")
    text = " ".join(ElementTree.fromstring(heat.svg).itertext())
    assert [f"c = {c}" in text for c in range(4)] == [True, True, True, False]
