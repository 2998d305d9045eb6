"""Efficient-training methods: hand-worked cases, the account of their work, and the same bytes after a kill."""

from __future__ import annotations

import math
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import percentileofscore
from torch import nn

from pipeline_lib.models.blocks import blocks, only
from pipeline_lib.training.methods import layer_dropping, layer_stacking, selective_backprop
from pipeline_lib.training.methods.layer_dropping import drop_probability, kept
from pipeline_lib.training.methods.layer_stacking import LayerStacking
from pipeline_lib.training.methods.selective_backprop import SelectiveBackprop, percentiles
from tests import training_bench
from tests.training.cram_bench import SHAPES, Bench, composed, lines, losses, method, methods, result
from tests.training_bench import Case, Sabotage

JOB: Any = SimpleNamespace(settings={"seed": 3, "recipe": {"global_batch": 8}})


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("cram"))


# -- every method ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*methods(), "none", "composed"])
def test_the_same_losses_again_and_after_a_kill(bench: Bench, name: str) -> None:
    """Broken off between checkpoints, twice, each time going on from the one before."""
    listed = composed() if name == "composed" else [] if name == "none" else [method(name)]
    shape = ("crammed", "llama", "bert")[len(name) % 3]
    whole = bench.train(f"{name}-whole", shape, methods=listed)
    steps = result(whole)["steps"]
    assert steps >= 5
    assert lines(whole)[-1]["progress"] >= 1
    killed = f"{name}-killed"
    bench.train(killed, shape, dies_after=4, methods=listed)
    assert not (bench.root / killed / "out" / "train.json").exists()
    resumed = bench.loop(killed, shape, methods=listed)
    assert resumed.step == 3, "the checkpoint before"
    out = bench.train(killed, shape, methods=listed)
    assert losses(out) == losses(whole)
    assert result(out) == result(whole)
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", ["bitflip", "ternary"])
def test_methods_work_on_transformed_models(bench: Bench, kind: str) -> None:
    """Passes that only look have the faults of their step, so a resumed training chooses the same."""
    flips = {"type": "bitflip", "weight": {"p_frac": 0.01}, "input": {"p_frac": 0.01}}
    given: dict[str, Any] = {"methods": composed(), "transform": [flips if kind == "bitflip" else {"type": kind}]}
    whole = bench.train(f"{kind}-whole", **given)
    bench.train(f"{kind}-killed", dies_after=4, **given)
    out = bench.train(f"{kind}-killed", **given)
    assert losses(out) == losses(whole)
    assert result(out) == result(whole)
    assert losses(whole) != losses(bench.train("plain", methods=composed()))


@pytest.mark.parametrize("name", methods())
def test_every_method_changes_what_is_trained(bench: Bench, name: str) -> None:
    with_it = bench.train(f"{name}-with", methods=[method(name)])
    without = bench.train("without")
    assert losses(with_it) != losses(without)


@pytest.mark.slow
def test_real_kills_and_ranks(tmp_path: Path) -> None:
    """All three at once: SIGKILL in real processes, and two ranks choose what one chooses."""
    ranks = training_bench.Bench(Case("cram", "bert"), tmp_path)
    stacking = {"layer-stacking": {"initial_layers": 1, "at": [0.3]}}
    recipe = {"methods": [stacking, method("layer-dropping"), method("selective-backprop")], "warmup_steps": 0}
    whole = ranks.fresh("whole", recipe=recipe)
    assert ranks.run(whole) == [0]
    work = ranks.fresh("killed", recipe=recipe)
    assert ranks.run(work, Sabotage("kill", "log", 5)) == [-signal.SIGKILL]
    assert ranks.run(work) == [0]
    ranks.same_result(work, whole)
    two = ranks.fresh("two", recipe=recipe)
    assert ranks.run(two, world=2) == [0, 0]
    one, both = result(whole / "out"), result(two / "out")
    assert one["work"] == both["work"]
    assert one["methods"] == both["methods"]
    for a, b in zip(lines(whole / "out"), lines(two / "out"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-4)


# -- layer stacking ----------------------------------------------------------------------------------------------------


class Toy(nn.Module):
    """Layers that can be told apart."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(layers))
        for number, layer in enumerate(self.layers):
            nn.init.constant_(layer.weight, number)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def stacking(layers: int = 8, optimizer: Any = None, **settings: Any) -> LayerStacking:
    made = LayerStacking(layer_stacking.Settings(**{"initial_layers": 2, "at": (0.125, 0.3), **settings}), JOB)
    model = Toy(layers)
    made.cram = SimpleNamespace(depth=layers, progress=lambda step: step / 1000)  # type: ignore[assignment]
    made.loop = SimpleNamespace(model=model, optimizer=optimizer(model) if optimizer else None)  # type: ignore[assignment]
    made.prepare()
    return made


def values(made: LayerStacking) -> list[float]:
    return [layer.weight[0, 0].item() for layer in blocks(made.loop.model)]  # type: ignore[index, union-attr]


def adamw(model: nn.Module) -> torch.optim.AdamW:
    """An optimizer that has made one step with the first two layers."""
    made = torch.optim.AdamW(model.parameters(), lr=0.0)
    for number, layer in enumerate(blocks(model)[:2]):
        for parameter in layer.parameters():
            parameter.grad = torch.full_like(parameter, number + 1.0)
    made.step()
    made.zero_grad()
    return made


@pytest.mark.parametrize(("spent", "depth"), [(0, 2), (124, 2), (125, 4), (299, 4), (300, 8), (1000, 8)])
def test_stacking_grows_where_the_budget_says(spent: int, depth: int) -> None:
    """N below an eighth of the budget, 2N below three tenths, 4N from there on; also when asked late."""
    made = stacking(optimizer=adamw)
    made.before_step(spent)
    assert made.depth == depth
    assert list(made.layers(range(8), 0, 0, True)) == list(range(depth)) == list(made.layers(range(8), 0, 0, False))


@pytest.mark.parametrize(
    ("order", "first", "second"),
    [("stacked", [0, 1, 0, 1], [0, 1] * 4), ("interleaved", [0, 0, 1, 1], [0, 0, 0, 0, 1, 1, 1, 1])],
)
def test_stacking_copies_layers_and_shares_none(order: str, first: list[int], second: list[int]) -> None:
    made = stacking(order=order, optimizer=adamw)
    made.before_step(200)
    assert values(made)[:4] == first
    made.before_step(300)
    assert values(made) == second
    with torch.no_grad():
        blocks(made.loop.model)[0].weight.fill_(9)  # type: ignore[operator, union-attr]
    assert values(made)[1:] == second[1:], "copies, not the same tensor"


@pytest.mark.parametrize(
    ("order", "how", "expected"),
    [
        ("stacked", "kept", [1, 2, None, None]),
        ("stacked", "copied", [1, 2, 1, 2]),
        ("stacked", "reset", [None] * 4),
        ("interleaved", "kept", [1, None, 2, None]),
        ("interleaved", "copied", [1, 1, 2, 2]),
    ],
)
def test_stacking_moves_optimizer_state(order: str, how: str, expected: list[float | None]) -> None:
    """As published: kept, and empty for new layers with a step counter of their own, whose reset was never asked for."""
    made = stacking(order=order, optimizer=adamw, optimizer_state=how)
    made.before_step(125)
    state = made.loop.optimizer.state
    found = [state.get(layer.weight) for layer in blocks(made.loop.model)]  # type: ignore[arg-type, call-overload]
    assert [None if not s else pytest.approx(float(s["exp_avg"][0, 0])) for s in found[:4]] == [
        None if gradient is None else pytest.approx(0.1 * gradient) for gradient in expected
    ]
    for parameter in made.loop.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    made.loop.optimizer.step()  # the published reset, had it been asked for, would end here in a KeyError
    steps = [float(state[layer.weight]["step"]) for layer in blocks(made.loop.model)[:4]]  # type: ignore[index]
    assert steps == [1 if gradient is None else 2 for gradient in expected]


def test_a_grown_model_computes_what_its_layers_twice_over_compute(bench: Bench) -> None:
    loop = bench.loop("grown", methods=[{"layer-stacking": {"initial_layers": 2, "at": [0.5]}}])
    model, tokens_BT = loop.model.eval(), torch.arange(16).view(1, 16)
    with torch.no_grad(), only(model, [0, 1]):
        shallow = model(tokens_BT).logits
    layers = model.bert.layers
    model.bert.layers = nn.ModuleList([layers[0], layers[1], layers[0], layers[1]])
    with torch.no_grad():
        twice = model(tokens_BT).logits
    model.bert.layers = layers
    loop.hooks.methods[0]._double()
    with torch.no_grad():
        grown = model(tokens_BT).logits
    assert torch.equal(grown, twice)
    assert not torch.equal(grown, shallow)
    assert grown.shape == shallow.shape


def test_layers_that_wait_are_not_touched(bench: Bench) -> None:
    """They are there from the start, get no gradient, and no weight decay."""
    start = bench.loop("waiting-start", methods=[method("layer-stacking")], weight_decay=0.5)
    before = {name: tensor.clone() for name, tensor in start.model.state_dict().items() if ".layers.3." in name}
    work = bench.root / "waiting" / "checkpoints" / "step-000003" / "weights.safetensors"
    bench.train("waiting", methods=[method("layer-stacking")], weight_decay=0.5, dies_after=4)
    after = load_file(work)
    assert before
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


# -- layer dropping ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("spent", "p"), [(0.0, 0.0), (0.001, 0.0476), (0.01, 0.3161), (0.05, 0.4966), (1.0, 0.5)])
def test_the_drop_probability_grows(spent: float, p: float) -> None:
    assert drop_probability(spent, keep=0.5, gamma=100) == pytest.approx(p, abs=5e-5)


@pytest.mark.parametrize(("depth", "mean"), [(16, 11.75), (10, 7.25)])
def test_deep_layers_are_dropped_most(depth: int, mean: float) -> None:
    """Layer i of L goes with probability p·i/L, each on its own: (3L - 1)/4 stay where p is a half."""
    n = 4000
    draws = [set(kept(range(depth), 0.5, f"{k}")) for k in range(n)]
    assert sum(map(len, draws)) / n == pytest.approx(mean, abs=0.1)
    for i in range(1, depth + 1):
        share, expected = sum(i - 1 in draw for draw in draws) / n, 1 - 0.5 * i / depth
        assert abs(share - expected) < 4.5 * math.sqrt(expected * (1 - expected) / n), i


def test_no_layer_is_dropped_at_first_and_all_never() -> None:
    assert list(kept(range(5), 0.0, "x")) == list(range(5))
    assert list(kept(range(1), 1.0, "x")) == [0], "should none stay, all do"
    assert kept(range(5), 0.5, "x") == kept(range(5), 0.5, "x")


def test_groups_have_gates_of_their_own_whatever_the_micro_batch(bench: Bench) -> None:
    """The same sub-networks, charged alike, for micro-batches below, at and above a group's size."""
    listed = [{"layer-dropping": {"group": 2, "keep": 0.3}}]
    found = [bench.train(f"micro-{micro}", methods=listed, execution={"micro_batch": micro}) for micro in (1, 2, 8)]
    assert result(found[0])["work"] == result(found[1])["work"] == result(found[2])["work"]
    assert len({row["layers"] for row in result(found[0])["work"]}) > 1
    for one, other in ((found[0], found[1]), (found[1], found[2])):
        assert losses(one) == pytest.approx(losses(other), rel=1e-4)
    made = layer_dropping.method(layer_dropping.Settings.model_validate({"group": 2, "keep": 0.3}), JOB)
    made.cram = SimpleNamespace(progress=lambda step: 0.5)  # type: ignore[assignment]
    gates = {tuple(made.layers(range(8), step, first, True)) for step in range(3) for first in range(0, 8, 2)}
    assert len(gates) > 6
    assert list(made.layers(range(8), 0, 0, False)) == list(range(8)), "validation and selection use all"
    with pytest.raises(Exception, match="parts of groups"):
        bench.train(
            "micro-3", methods=[{"layer-dropping": {"group": 4}}], global_batch=12, execution={"micro_batch": 6}
        )


@pytest.mark.parametrize("shape", SHAPES)
def test_a_dropped_layer_passes_its_input_on(bench: Bench, shape: str) -> None:
    model = bench.loop(f"skips-{shape}", shape).model.eval()
    tokens_BT = torch.arange(16).view(1, 16)
    with torch.no_grad():
        whole = model(tokens_BT).logits
        with only(model, [0, 3]):
            two = model(tokens_BT).logits
        names = [name for name, _ in model.named_parameters()]
        layers = blocks(model)
        for layer in (layers[1], layers[2]):
            layer.forward = lambda hidden, *args, **kwargs: hidden  # type: ignore[method-assign]
        assert torch.equal(model(tokens_BT).logits, two)
    assert not torch.equal(whole, two)
    assert [name for name, _ in model.named_parameters()] == names


# -- selective backprop ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("history", "scores", "expected"),
    [([1, 2, 3, 4], [1, 2.5, 4, 0.5, 9], [0.25, 0.5, 1, 0, 1]), ([1, 1, 2, 2], [1, 2], [0.375, 0.875])],
)
def test_percentiles_by_mean_rank(history: list[float], scores: list[float], expected: list[float]) -> None:
    found = percentiles(torch.tensor(history, dtype=torch.float32), torch.tensor(scores, dtype=torch.float32))
    assert found.tolist() == expected
    assert [percentileofscore(history, score, "rank") / 100 for score in scores] == expected


def test_percentiles_agree_with_scipy() -> None:
    generator = torch.Generator().manual_seed(0)
    history_N = torch.randint(20, (77,), generator=generator).float()
    values_B = torch.randint(-2, 24, (50,), generator=generator).float()
    expected = [percentileofscore(history_N.numpy(), float(value), "rank") / 100 for value in values_B]
    assert percentiles(history_N, values_B).tolist() == pytest.approx(expected)


def selecting(losses_of: Any, **settings: Any) -> tuple[SelectiveBackprop, Any]:
    """The method on a stream 0, 1, 2 … whose losses a function gives; and what gives fresh sequences."""
    made = SelectiveBackprop(selective_backprop.Settings(**settings), JOB)
    made.cram = SimpleNamespace(losses=lambda batch, step: losses_of(batch["place"].float()))  # type: ignore[assignment]
    made.prepare()
    place = [0]

    def below(count: int) -> dict[str, torch.Tensor]:
        place[0] += count
        return {"place": torch.arange(place[0] - count, place[0]), "input_ids": torch.zeros(count, 2)}

    return made, below


@pytest.mark.parametrize(("beta", "share"), [(1.0, 0.5), (2.0, 1 / 3), (0.0, 1.0)])
def test_the_share_that_is_kept(beta: float, share: float) -> None:
    """1/(beta + 1): 0.498 and 0.336 were measured with the published code."""
    made, below = selecting(lambda place: (place * 7919) % 1009, beta=beta)
    for step in range(40):
        assert len(made.draw(step, 96, below)["place"]) == 96
    found = made.result()
    assert found["seen"] >= 40 * 96
    assert found["share"] == pytest.approx(share, abs=4.5 * math.sqrt(share * (1 - share) / found["seen"]) + 0.01)


def test_hard_sequences_are_kept_and_none_is_lost_or_repeated() -> None:
    made, below = selecting(lambda place: place % 10, candidates=16)
    drawn = torch.cat([made.draw(step, 24, below)["place"] for step in range(60)])
    assert drawn.tolist() == sorted(set(drawn.tolist())), "in the order they were seen, each once"
    assert len(drawn) + made._waiting() == made.chosen
    counts = torch.bincount(drawn % 10, minlength=10)
    assert counts[9] > 3 * counts[1]


def test_the_history_holds_the_last_losses_the_newest_among_them() -> None:
    """A first-in-first-out list of 5: candidates are compared with each other first of all."""
    made, below = selecting(lambda place: place, candidates=3, history=5, beta=0)
    made.draw(0, 3, below)
    assert made.losses_N.tolist() == [0, 1, 2]
    made.draw(1, 6, below)
    assert made.losses_N.tolist() == [4, 5, 6, 7, 8]


def test_chosen_sequences_are_trained_on_under_the_masks_they_were_chosen_by(bench: Bench) -> None:
    loop = bench.loop("masks", methods=[method("selective-backprop")])
    seen: dict[int, torch.Tensor] = {}
    original = loop.hooks.losses

    def watched(batch: Any, step: int) -> torch.Tensor:
        seen.update({int(p): ids for p, ids in zip(batch["place"], batch["input_ids"], strict=True)})
        return original(batch, step)

    loop.hooks.losses = watched
    for _, batch in loop.hooks.read(loop, 0):
        for place, ids_T in zip(batch["place"], batch["input_ids"], strict=True):
            assert torch.equal(seen[int(place)], ids_T)
    assert len(seen) > 8
