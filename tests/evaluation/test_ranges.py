"""Ranges of operands, and the thresholds proposed from them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pipeline_lib.config.errors import UserError
from pipeline_lib.evaluation.base import Subject
from pipeline_lib.evaluation.ranges import Magnitudes, measure
from pipeline_lib.evaluation.run import Session
from pipeline_lib.evaluation.tasks.ranges import Settings, readable
from pipeline_lib.evaluation.thresholds import round_up
from pipeline_lib.transforms.bitflip import Settings as BitFlip

TASK = {"type": "ranges", "dataset": "pydocs", "split": "test", "sequences": 6, "seq_len": 16}


@pytest.fixture(scope="module")
def session() -> Session:
    return Session()


def asked(**task: Any) -> dict[str, Any]:
    return {"task": {**TASK, **task}, "transform": [], "fault_seeds": [], "seed": 0, "dtype": "float32"}


@pytest.mark.parametrize("size", [3, 100, 999, 1000, 50_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_top_holds_its_share(size: int, dtype: torch.dtype) -> None:
    """Of tensors with fewer than 1,000 elements too, where the source takes the mean of none."""
    x = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype)
    seen = Magnitudes()
    for part in x.split(7):
        seen.add(part)
    sizes = x.float().abs().sort(descending=True).values
    allowed = math.floor(1e-3 * size)
    assert seen.max == sizes[0]
    top = seen.top(1e-3)
    exact = float(sizes[allowed])  # the largest value with no more than the allowed number above it
    assert exact <= top <= min(seen.max, exact * (1 + 2**-7))
    if allowed:
        assert int((sizes >= top).sum()) <= allowed


def test_what_is_not_finite_is_counted_apart() -> None:
    seen = Magnitudes()
    seen.add(torch.tensor([1.0, -2.0, math.nan, math.inf, -math.inf, 0.0]))
    assert (seen.not_finite, seen.max, seen.top(0.5)) == (3, 2.0, pytest.approx(1.0, rel=2**-7))


def test_every_layer_is_measured_at_both_operands(checkpoint: Path) -> None:
    """Against all inputs collected; whatever the batch size."""
    from pipeline_lib.models.checkpoint import load_model, load_tokenizer

    model, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)
    text_BT = torch.randint(3, 300, (6, 16), generator=torch.Generator().manual_seed(0))
    found = measure(Subject(model, tokenizer, None, 6), text_BT, "*.layer*.*", 0.01)
    assert len(found) == 14
    assert not any("lm_head" in record["layer"] for record in found)
    inputs: dict[str, torch.Tensor] = {}
    names = [record["layer"] for record in found]
    for name in names:
        hook: Any = lambda _, arguments, name=name: inputs.__setitem__(name, arguments[0])  # noqa: E731
        model.get_submodule(name).register_forward_pre_hook(hook)
    with torch.no_grad():
        model(text_BT)  # type: ignore[operator]
    for record in found:
        module: Any = model.get_submodule(record["layer"])
        for operand, tensor in (("input", inputs[record["layer"]]), ("weight", module.weight)):
            sizes = tensor.detach().abs().flatten().sort(descending=True).values
            exact = float(sizes[math.floor(0.01 * len(sizes))])
            assert record[operand]["max"] == sizes[0]
            assert exact <= record[operand]["top"] <= exact * (1 + 2**-7)
    for size in (1, 4):
        again = measure(Subject(model, tokenizer, None, size), text_BT, "*.layer*.*", 0.01)
        for one, other in zip(found, again, strict=True):
            assert one["weight"] == other["weight"]
            assert other["input"]["max"] == pytest.approx(one["input"]["max"], rel=1e-5)


def test_thresholds_can_be_pasted_and_zero_nothing(session: Session, checkpoint: Path, dataset: Path) -> None:
    inputs = {"checkpoint": checkpoint, "dataset": dataset}
    arm = session.evaluate(asked(sequences=12, seq_len=32), inputs, None, {})
    files = readable(Settings(**TASK), {"clean": arm.records})
    assert len(files["jsonl"].splitlines()) == 14
    assert json.loads(files["jsonl"].splitlines()[0])["layer"] == "model.layers.0.self_attn.q_proj"
    assert files["md"].count("| model.layers.") == 14
    sites = yaml.safe_load(files["yaml"])["sites"]
    transform = BitFlip(sites=sites).semantic()

    def perplexity(transform: list[dict[str, Any]]) -> float:
        task = {"type": "lm_eval", "task": "pydocs", "dataset": "pydocs", "max_length": 32}
        given = {**asked(), "task": task, "transform": transform, "fault_seeds": [0] if transform else []}
        return session.evaluate(given, inputs, None, {}).result["metrics"]["bits_per_byte"]["mean"]

    clean = perplexity([])
    assert perplexity([transform]) == pytest.approx(clean, rel=1e-3), "the guard alone"
    tight = BitFlip(input={"zero_out": 0.1}).semantic()  # type: ignore[arg-type]
    assert perplexity([tight]) != pytest.approx(clean, rel=1e-2)


def test_records_hold_figures_and_no_tensors(session: Session, checkpoint: Path, dataset: Path) -> None:
    arm = session.evaluate(asked(), {"checkpoint": checkpoint, "dataset": dataset}, None, {})
    assert len(json.dumps(arm.records["clean"])) < 14 * 400
    assert set(arm.result["metrics"]) == {"input_top", "input_max", "weight_top", "weight_max"}
    first = arm.records["clean"][0]
    assert first["zero_out"]["input"] >= 1.25 * first["input"]["max"]
    by_quantile = session.evaluate(
        asked(threshold="quantile", margin=1.0), {"checkpoint": checkpoint, "dataset": dataset}, None, {}
    ).records["clean"][0]
    assert first["zero_out"]["input"] > by_quantile["zero_out"]["input"] >= by_quantile["input"]["top"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sequences": 10_000}, "too little text"),
        ({"seq_len": 64}, "up to 32"),
        ({"layers": "*.conv*"}, "matches no linear layer"),
    ],
)
def test_what_cannot_be_measured_is_told(
    session: Session, checkpoint: Path, dataset: Path, change: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        session.evaluate(asked(**change), {"checkpoint": checkpoint, "dataset": dataset}, None, {})


@pytest.mark.parametrize(("value", "expected"), [(1.2301, 1.24), (0.0, 0.0), (1.0, 1.0), (999.1, 1000), (3.0e-5, 3e-5)])
def test_thresholds_are_rounded_up(value: float, expected: float) -> None:
    assert round_up(value) == pytest.approx(expected, rel=1e-12)
    assert round_up(value) >= value
