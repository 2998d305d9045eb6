"""What a training spends: by work, never by this machine's clock; what is charged, what is free, and what costs nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.training.cram_bench import Bench, composed, lines, losses, method, result


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("accounts"))


@pytest.mark.parametrize("budget", [{"flops": 2e8}, {"rst_hours": 2e8 / 4.42e13 / 3600, "reference": "flops"}])
def test_the_rate_is_0_where_the_budget_ends(bench: Bench, budget: dict[str, float]) -> None:
    """The step that crosses the end changes nothing, so no work beyond the budget counts; one cycle before it."""
    out = bench.train(f"end-{min(budget)}", budget=budget)
    log = lines(out)
    assert log[-1]["lr"] == 0.0
    assert log[-1]["progress"] >= 1 > log[-2]["progress"]
    for line in log:
        factor = min(2 * line["progress"], max(2 - 2 * line["progress"], 0))
        assert line["lr"] == pytest.approx(1e-2 * factor)
    before = load_file(bench.root / out.parent.name / "checkpoints" / f"step-{len(log):06d}" / "weights.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in before.values())
    price = bench.loop(f"price-{min(budget)}", budget=budget).hooks.flops
    assert result(out)["flops"] == price("train", 4, 8) * len(log)


def test_a_slower_machine_trains_the_same(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that runs at another speed changes no budget of reference time; only one of wall-clock."""
    import time

    whole = bench.train("fast", methods=composed())
    clock = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: 50 * clock())
    assert losses(bench.train("slow", methods=composed())) == losses(whole)


def test_only_steps_are_on_the_clock(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wall-clock: a second a step here. Start-up, validation and checkpoints take ten each and cost nothing."""
    from pipeline_lib.training import cram, meter
    from pipeline_lib.training.loop import Loop

    now = [0.0]

    def lasting(seconds: float, original: Any) -> Any:
        def slow(*args: Any, **kwargs: Any) -> Any:
            now[0] += seconds
            return original(*args, **kwargs)

        return slow

    monkeypatch.setattr(meter.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(cram.CramHooks, "valid_loss", lasting(10, lambda self, step: 1.0))
    monkeypatch.setattr(Loop, "save", lasting(10, Loop.save))
    monkeypatch.setattr(cram.CramHooks, "prepare", lasting(10, cram.CramHooks.prepare))
    monkeypatch.setattr(cram.CramHooks, "begin", lasting(0.5, cram.CramHooks.begin))  # two micro-batches
    given = {"budget": {"wall_hours": 10.5 / 3600}, "valid_every": 1 / 3600}
    bench.train("wall", dies_after=5, **given)
    out = bench.train("wall", **given)
    assert result(out)["steps"] == 11
    assert [line["spent"] * 3600 for line in lines(out)] == pytest.approx(range(1, 12))
    assert [line["lr"] for line in lines(out)][5:] == pytest.approx(
        [1e-2 * max(0, 2 - 2 * (spent / 10.5)) for spent in range(6, 12)]
    ), "a step is expected to take as long as the one before"


def test_validation_and_checkpoints_cost_nothing(bench: Bench) -> None:
    plain = bench.train("unseen", methods=composed())
    seen = bench.train("seen", methods=composed(), valid_every=6e7, execution={"checkpoint_every": 1})
    assert losses(seen) == losses(plain)
    assert result(seen) == result(plain)
    at = [line["spent"] for line in lines(seen) if "valid_loss" in line]
    crossed = [int(line["spent"] / 6e7) for line in lines(seen)]
    firsts = [line["spent"] for line, a, b in zip(lines(seen), crossed, [0, *crossed], strict=False) if a > b]
    assert at == firsts, "at every crossing, and the last step is one of them"
    assert all(2 < line["valid_loss"] < 6 for line in lines(seen) if "valid_loss" in line)
    seldom = bench.train("seldom", methods=composed(), valid_every=6e7, execution={"log_every": 1000})
    found = [(line["step"], line["valid_loss"]) for line in lines(seldom)]
    assert found == [(line["step"], line["valid_loss"]) for line in lines(seen) if "valid_loss" in line], (
        "each has a line of its own step, however seldom the log is written"
    )


def test_validation_has_fixed_text_and_masks(bench: Bench) -> None:
    one = bench.loop("valid-one", valid_sequences=5).hooks
    other = bench.loop("valid-other", valid_sequences=5, methods=composed()).hooks
    other.seed = 11
    held = one._held_out(5)
    assert all(torch.equal(held[name], other._held_out(5)[name]) for name in held)
    assert one.valid_loss(0) == pytest.approx(one.valid_loss(7))
    assert len(held["labels"]) == 5
    assert len(one._held_out(10**6)["labels"]) == 199 // 16, "all there are"


def test_text_read_twice_is_counted_in_epochs(bench: Bench) -> None:
    out = bench.train("epochs", methods=[method("selective-backprop")], steps=3)
    found = result(out)
    assert found["sequences_read"] == found["methods"]["selective-backprop"]["seen"]
    assert found["epochs"] == pytest.approx(found["sequences_read"] / (1199 // 16))


@pytest.mark.parametrize("charged", [True, False])
def test_selection_is_charged_or_free(bench: Bench, charged: bool) -> None:
    """`track_forward_pass_only: false` is the ablation with free selection: the same choice, more steps."""
    out = bench.train(
        f"charged-{charged}",
        methods=[method("selective-backprop")],
        track_forward_pass_only=charged,
        budget={"flops": 1e8},
    )
    found = result(out)
    by = {(row["kind"], row["charged"]): row["sequences"] for row in found["work"]}
    assert by["forward", charged] == found["methods"]["selective-backprop"]["seen"]
    assert by["train", True] == 8 * found["steps"]
    assert (found["flops_not_charged"] > 0) != charged
    if not charged:
        assert found["steps"] > result(bench.root / "charged-True" / "out")["steps"]
