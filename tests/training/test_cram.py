"""Recipe cram beside its methods: what decays, precisions, the smallest budget, the optimizer of a method, 3090 hours."""

from __future__ import annotations

import math
import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from pipeline_lib.config.base import Settings as Base
from pipeline_lib.config.registry import METHODS
from pipeline_lib.models import bert
from pipeline_lib.training.cram import CramHooks
from pipeline_lib.training.meter import Meter
from pipeline_lib.training.methods import Method
from pipeline_lib.training.optimizers import decayed
from tests.models.test_crammed_bert import PUBLISHED
from tests.training.cram_bench import Bench, Settings, lines, losses, method, result


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("cram"))


@pytest.mark.parametrize(("as_published", "exempt"), [(False, 69), (True, 34)])
def test_what_decays(as_published: bool, exempt: int) -> None:
    """As published, only the norms' 34 biases do not; else no vector does: 34 biases, 34 weights, the positions' scale."""
    with torch.device("meta"):
        model = bert.build(PUBLISHED)
    matrices, others = decayed(model, as_published)
    assert len(others) == exempt
    assert len(matrices) + len(others) == len(list(model.parameters()))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_16_bits(bench: Bench, precision: str) -> None:
    """fp16 goes with loss scaling: a step whose gradient overflows is left out, and costs all the same."""
    listed = [method("layer-stacking"), method("selective-backprop")]
    exact = bench.train("fp32", methods=listed)
    out = bench.train(precision, methods=listed, precision=precision)
    assert losses(out)[0] == pytest.approx(losses(exact)[0], rel=1e-2)
    assert losses(out) != losses(exact)
    assert all(map(math.isfinite, losses(out)))


def test_the_smallest_budget_is_one_whole_step(bench: Bench) -> None:
    """The published selective backprop ends without an update, and fails, when its first selection spends the budget."""
    out = bench.train("smallest", methods=[method("selective-backprop")], budget={"flops": 1.0})
    assert result(out)["steps"] == 1
    assert lines(out)[0]["lr"] == 0.0
    assert result(out)["work"][-1]["sequences"] == 8


class OfIts(Base):
    """Settings of a method that brings an optimizer."""

    type: str


class Own(Method):
    """Plain gradient descent at a rate of its own, on a loss of 0."""

    lr = 0.5

    def optimizer(self, matrices: list[Any], others: list[Any]) -> torch.optim.Optimizer:
        return torch.optim.SGD([*matrices, *others], momentum=0.9)

    def weigh(self, batch: Any, loss_B: torch.Tensor) -> torch.Tensor:
        return loss_B * 0

    def lr_factor(self, progress: float) -> float:
        return 0.5


def test_a_method_may_bring_the_optimizer_and_weights_of_examples(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a package of its own; with a rate of its own; a second one is refused."""
    for name in ("own-one", "own-two"):
        module = ModuleType(name)
        vars(module).update(Settings=OfIts, OPTIMIZER=True, method=Own)
        monkeypatch.setitem(sys.modules, f"package_of_{name}", module)
        monkeypatch.setitem(METHODS._extra, name, f"package_of_{name}")
    given: dict[str, Any] = {"steps": 4, "methods": ["own-one"], "warmup_steps": 0, "decay": "constant"}
    assert isinstance(bench.loop("own", **given).optimizer, torch.optim.SGD)
    out = bench.train("own", **given)
    assert [line["lr"] for line in lines(out)] == [0.25] * 4
    assert losses(out) == [0.0] * 4
    with pytest.raises(ValueError, match="own-one and own-two each bring an optimizer"):
        Settings(steps=1, methods=["own-one", "own-two"])


def test_a_day_of_the_3090_to_the_step(bench: Bench) -> None:
    """Without training: the account of the published recipe ends at 31,957 steps, 24 h, and a rate of 0."""
    settings = Settings(budget={"rst_hours": 24}).resolved()
    assert settings.budget is not None
    hooks = CramHooks(settings, bench.job("day", steps=1))
    hooks.meter = Meter(settings.budget, hooks.work, lambda *passes: math.nan, hooks._job)
    step, factor = 0, math.nan
    while hooks.progress(step) < 1:
        hooks.work.add("train", 16, 1536)
        factor, step = hooks.lr_factor(step), step + 1
        assert factor == pytest.approx(max(0.0, min(step * 2.7036, 86_400 - step * 2.7036)) / 43_200)
    assert step == math.ceil(86_400 / 2.7036) == 31_958, "31,957 whole steps and the one that crosses the end"
    assert hooks.spent() == pytest.approx(24, rel=1e-4)
    assert factor == 0.0
