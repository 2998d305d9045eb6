"""Merges, restarts and schedules of ReLoRA: pure parts first, then merges on small models."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline_lib.config.errors import UserError
from pipeline_lib.training.recipes.relora import Settings
from pipeline_lib.training.relora import ReLoRAHooks, pruned, restart_optimizer
from pipeline_lib.training.schedules import is_merge, jagged_lr_factor, lr_factor, published_lr_factor
from pipeline_lib.transforms.apply import apply
from pipeline_lib.transforms.low_rank import Adapter, add_adapters

# -- schedules ---------------------------------------------------------------------------------------------------------

VECTOR = {
    0: 0, 1: 1e-5, 50: 0.025, 99: 0.09801, 100: 0.1, 999: 0.999, 1000: 1, 2000: 0, 2001: 0.00980, 2050: 0.48929,
    2100: 0.97755,
}  # fmt: skip


def published(step: int, steps: int = 50_000, min_factor: float = 0.0) -> float:
    return published_lr_factor(step, steps, 1000, min_factor, 2000, 100)


def test_published_schedule_against_its_check_vector() -> None:
    for step, factor in VECTOR.items():
        assert published(step) == pytest.approx(factor, abs=6e-6), step


def test_published_run_is_30000_steps_of_a_decay_over_50000() -> None:
    """What config.yaml's min_lr_factor stands for."""
    for step in (1500, 10_150, 29_999):
        assert published(step, 30_000, 20 / 49) == pytest.approx(published(step), rel=1e-12)


def test_published_merges_come_one_step_late() -> None:
    assert [step for step in range(1, 35) if is_merge(step, 10, "published")] == [11, 21, 31]
    assert [step for step in range(1, 35) if is_merge(step, 10, "jagged")] == [10, 20, 30]


def test_the_schedule_decays_and_is_never_negative() -> None:
    """The slip in the source's documentation: the smaller of two terms, which is a constant, then below 0."""

    def documented(step: int, warmup: int = 1000, steps: int = 50_000, floor: float = 1e-5) -> float:
        return step / warmup if step < warmup else min(floor, 1 - (step - warmup) / (steps - warmup))

    for step in (20_150, 30_150, 40_150):
        assert documented(step) == 1e-5
        assert published(step) == pytest.approx(1 - (step - 1000) / 49_000), "the larger of the two terms"
    assert documented(100_500) < 0
    assert all(published(step) >= 0 for step in (50_000, 100_500, 1_000_000))


def test_no_step_is_wasted() -> None:
    """In the source every merge ended a step of rate 0, the first of all among them."""
    steps, every, warmup = 200, 50, 10

    def jagged(step: int) -> float:
        return jagged_lr_factor(step, lr_factor(step, steps, 20, "linear", 0.0), every, warmup)

    factors = [jagged(step) for step in range(steps)]
    assert min(factors) > 0
    base = [lr_factor(step, steps, 20, "linear", 0.0) for step in range(steps)]
    assert factors[:50] == base[:50], "the first cycle has one warm-up, not two"
    assert factors[50] == pytest.approx(base[50] / 11)
    assert factors[59] == pytest.approx(base[59] * 10 / 11)
    assert factors[60:100] == base[60:100]
    wasted = [step for step in range(1, 12_000) if is_merge(step, 2000, "published") and published(step - 1) == 0]
    assert wasted == [2001, 4001, 6001, 8001, 10_001]


def test_warm_up_must_fit_between_merges() -> None:
    with pytest.raises(ValueError, match="reset_warmup 5 must be less than reset_every 5"):
        Settings(steps=10, reset_every=5, reset_warmup=5)
    with pytest.raises(ValueError, match="the published schedule decays linearly"):
        Settings(steps=10, schedule="published", decay="cosine")


def test_frozen_weights_cannot_be_clipped() -> None:
    with pytest.raises(ValueError, match="clip_weights changes weights that relora leaves frozen"):
        Settings.model_validate({"steps": 10, "reset_every": None, "clip_weights": 0.1})


# -- adapters ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("features", "bound"), [(4160, 0.037407), (14400, 0.020323)])
def test_start_of_an_adapter(features: int, bound: float) -> None:
    adapter = Adapter((200, features), 128, 1.0, "xavier")
    adapter.reset("x")
    assert adapter.A.abs().max().item() == pytest.approx(bound, rel=1e-3)
    assert adapter.A.abs().max().item() <= bound * (1 + 1e-4)
    assert not adapter.B.any()


def test_a_restart_is_a_function_of_seed_layer_and_merge_alone() -> None:
    """In the source every process drew its own."""
    one, other = (Adapter((9, 7), 3, 1.0, "xavier") for _ in range(2))
    one.reset("0/layer/1")
    torch.manual_seed(77)
    other.reset("0/layer/1")
    assert torch.equal(one.A, other.A)
    other.reset("0/layer/2")
    assert not torch.equal(one.A, other.A)


def test_no_rank_above_the_full_one() -> None:
    assert Adapter((9, 7), 128, 1.0, "orthogonal").A.shape == (7, 7)


def test_a_pattern_that_names_nothing_is_an_error() -> None:
    with pytest.raises(UserError, match=r"recipe.targets: the pattern matches no linear layer of a block"):
        add_adapters(Stack(), ["*.mlp"], 2)


# -- merges ------------------------------------------------------------------------------------------------------------

TERNARY = {"type": "ternary", "sites": {"*": {}}}


class Stack(nn.Module):
    """Two linear layers as blocks, and an embedding that has no adapter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.start = nn.Embedding(5, 24)
        self.layers = nn.ModuleList([nn.Linear(24, 24), nn.Linear(24, 10, bias=False)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def trained(transform: list[dict[str, Any]], **settings: Any) -> tuple[ReLoRAHooks, Any]:
    """Hooks and a loop around a `Stack` whose adapters have learned something."""
    job: Any = SimpleNamespace(settings={"seed": 0})
    hooks = ReLoRAHooks(Settings(**{"steps": 10, "rank": 3, "precision": "fp32", **settings}), job)
    model = Stack()
    applied = apply(model, transform, seed=0)
    applied.context.begin(0, 0)
    loop: Any = SimpleNamespace(model=model, before=copy.deepcopy(model))
    hooks.prepare(loop)
    loop.optimizer = hooks.optimizer(model.parameters())
    for layer in hooks.layers.values():
        nn.init.normal_(layer.low_rank.B, std=0.1)
    return hooks, loop


def test_adapters_start_by_changing_nothing() -> None:
    hooks, loop = trained([])
    for layer in hooks.layers.values():
        nn.init.zeros_(layer.low_rank.B)
    x = torch.randn(4, 3, 24)
    assert torch.equal(loop.model(x), loop.before(x))
    trains = {name for name, parameter in loop.model.named_parameters() if parameter.requires_grad}
    assert trains >= {"start.weight", "layers.0.bias", "layers.0.low_rank.A", "layers.1.low_rank.B"}
    assert not trains & {"layers.0.weight", "layers.1.weight"}
    assert all(layer.low_rank.A.dtype == torch.float32 for layer in hooks.layers.values())


def test_the_rest_can_be_frozen() -> None:
    _, loop = trained([], train_rest=False)
    trains = {name for name, parameter in loop.model.named_parameters() if parameter.requires_grad}
    assert all(".low_rank." in name for name in trains)
    assert len(trains) == 4


def test_a_plain_merge_changes_nothing() -> None:
    hooks, loop = trained([])
    x = torch.randn(4, 3, 24)
    before, kept = loop.model(x), loop.model.start.weight.clone()
    hooks.merge(loop)
    torch.testing.assert_close(loop.model(x), before, rtol=1e-5, atol=1e-5)
    assert all(not layer.low_rank.B.any() for layer in hooks.layers.values())
    assert torch.equal(loop.model.start.weight, kept)
    assert hooks.merges == 1


def test_a_ternary_merge_changes_a_layer_by_its_roundings_and_no_more() -> None:
    """‖f_after(x) - f_before(x)‖ ≤ (‖W' - Q(W')‖ + ‖W - Q(W)‖)·‖x‖: the adapter was trained beside Q(W), and its update
    is added to W."""
    hooks, loop = trained([TERNARY])
    for name, layer in hooks.layers.items():
        weight = hooks.masters[name].clone()
        update = layer.low_rank.B.detach() @ layer.low_rank.A.detach()

        def grid(value: Tensor) -> Tensor:  # not the code under test
            scale = value.abs().mean()
            return torch.clamp(torch.round(value / scale), -1, 1) * scale

        x = torch.randn(50, 1, weight.shape[1])
        before = layer(x)
        new = weight + update
        after = nn.functional.linear(x, grid(new), layer.bias)
        bound = (new - grid(new)).norm() + (weight - grid(weight)).norm()
        changed = (after - before).norm(dim=-1).detach()
        assert (changed <= bound * x.norm(dim=-1) * (1 + 1e-5)).all()
        assert float((changed / (bound * x.norm(dim=-1))).max()) > 0.05, "the bound is of the right order"
        hooks.masters[name].copy_(weight)
        loop.check = (name, new, x, after)
    hooks.merge(loop)
    name, new, x, after = loop.check
    exact = nn.functional.linear(x, new, hooks.layers[name].bias)
    rounded = (hooks.layers[name](x) - exact).norm(dim=-1).detach()
    assert (rounded <= (new - grid(new)).norm() * x.norm(dim=-1) * (1 + 1e-5)).all(), "of the merged layer, W' alone"
    torch.testing.assert_close(hooks.masters[name], new)
    torch.testing.assert_close(hooks.layers[name](x), after, rtol=1e-4, atol=1e-5)


def test_small_updates_add_up_in_the_master_weights() -> None:
    """Many merges of an update far below a step of the grid move codes, which none of them does alone."""
    hooks, loop = trained([TERNARY])
    layer, moved = hooks.layers["layers.1"], []
    start = layer.functions_at_site.store.codes.clone()
    for _ in range(40):
        with torch.no_grad():
            layer.low_rank.A.copy_(torch.eye(3, 24))
            layer.low_rank.B.fill_(2e-3)
        hooks.merge(loop)
        moved.append(float((layer.functions_at_site.store.codes != start).float().mean()))
    assert moved[0] < 0.05
    assert moved[-1] > 0.1


def test_full_rank_and_a_restart_every_step_is_plain_sgd() -> None:
    """With orthogonal A of full rank, one SGD step of B moves the weight by -lr·G·AᵀA = -lr·G."""
    job: Any = SimpleNamespace(settings={"seed": 0})
    x, y = torch.randn(64, 24), torch.randn(64, 24)
    plain = nn.ModuleList([nn.Linear(24, 24)])
    model: Any = copy.deepcopy(plain)
    hooks = ReLoRAHooks(Settings(steps=99, rank=24, adapter_start="orthogonal"), job)
    loop: Any = SimpleNamespace(model=nn.Sequential(model))
    hooks.prepare(loop)
    loop.optimizer = torch.optim.SGD([p for p in loop.model.parameters() if p.requires_grad], lr=0.1)
    reference = torch.optim.SGD(plain.parameters(), lr=0.1)
    for _ in range(20):
        for layer, optimizer in ((plain[0], reference), (model[0], loop.optimizer)):
            optimizer.zero_grad()
            (layer(x) - y).square().mean().backward()
            optimizer.step()
        hooks.merge(loop)
    torch.testing.assert_close(hooks.masters["0.0"], plain[0].weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model[0].bias, plain[0].bias, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("base", ["bf16", "fp16"])
def test_a_base_in_half_precision_loses_no_update(base: str) -> None:
    """Master weights stay fp32, so updates below half precision's resolution add up over merges."""
    hooks, loop = trained([], base=base)
    layer, start = hooks.layers["layers.0"], hooks.masters["layers.0"].clone()
    assert layer.weight.element_size() == 2
    assert torch.isfinite(loop.model(torch.randn(2, 3, 24))).all()
    for _ in range(8):
        with torch.no_grad():
            layer.low_rank.A.copy_(torch.eye(3, 24))
            layer.low_rank.B.fill_(1e-6)
        hooks.merge(loop)
    torch.testing.assert_close(hooks.masters["layers.0"][:, :3], start[:, :3] + 8e-6, rtol=0, atol=2e-7)
    assert torch.equal(layer.weight, hooks.masters["layers.0"].to(layer.weight.dtype))


def test_export_is_the_merged_weight_and_leaves_the_training_as_it_is() -> None:
    hooks, loop = trained([])
    x = torch.randn(4, 3, 24)
    before = loop.model(x)
    state = hooks.whole(loop)
    assert state.keys() == {"start.weight", "layers.0.weight", "layers.0.bias", "layers.1.weight"}
    clean = Stack()
    clean.load_state_dict(state)
    torch.testing.assert_close(clean(x), before, rtol=1e-5, atol=1e-5)
    assert torch.equal(loop.model(x), before)
    assert hooks.merges == 0


# -- the optimizer's state ---------------------------------------------------------------------------------------------


def stepped(how: str, prune: float = 0.75) -> tuple[Any, Any, dict[Any, Any]]:
    """Hooks and loop after one step and a restart, and the state before the restart."""
    hooks, loop = trained([], optimizer_reset=how, prune=prune)
    (loop.model(torch.randn(9, 3, 24)).square().mean() + loop.model.start.weight.square().sum()).backward()
    loop.optimizer.step()
    before = {p: {k: v.clone() for k, v in state.items()} for p, state in loop.optimizer.state.items()}
    hooks.merge(loop)
    return hooks, loop, before


def test_reset_of_the_adapters_spares_the_rest() -> None:
    _, loop, before = stepped("adapters")
    names = {parameter: name for name, parameter in loop.model.named_parameters()}
    left = {names[parameter] for parameter in loop.optimizer.state}
    assert left == {"start.weight", "layers.0.bias"}
    kept = loop.optimizer.state[loop.model.start.weight]
    assert torch.equal(kept["exp_avg"], before[loop.model.start.weight]["exp_avg"])


def test_reset_of_all_forgets_everything() -> None:
    _, loop, before = stepped("all")
    assert len(before) == 6
    assert not loop.optimizer.state


def test_pruning_keeps_the_largest_moments() -> None:
    hooks, loop, before = stepped("pruned")
    for layer in hooks.layers.values():
        parameter = layer.low_rank.B
        for moment in ("exp_avg", "exp_avg_sq"):
            now, was = loop.optimizer.state[parameter][moment], before[parameter][moment]
            share = float((now == 0).float().mean())
            assert share == pytest.approx(0.75, abs=1 / now.numel())
            assert now.abs().max() == was.abs().max()
            assert was[now != 0].abs().min() >= was[now == 0].abs().max()
        assert loop.optimizer.state[parameter]["step"] == 1


def test_pruning_by_hand() -> None:
    values = torch.tensor([[3.0, -1.0], [0.5, -4.0]])
    assert pruned(values, 0.5).tolist() == [[3, 0], [0, -4]]
    assert pruned(values, 0.2).tolist() == values.tolist(), "rounded down"
    assert not pruned(torch.zeros(4), 0.5).any()


def test_a_restart_before_the_first_step_is_harmless() -> None:
    parameter = nn.Parameter(torch.zeros(2, 2))
    for how in ("adapters", "all", "pruned"):
        restart_optimizer(torch.optim.AdamW([parameter]), [parameter], how, 0.9)


def test_loss_scale_halves_on_overflow_and_grows() -> None:
    from pipeline_lib.training.loss_scale import GROW_EVERY, START, LossScale

    scale = LossScale(enabled=True)
    assert not scale.update(math.inf)
    assert scale.value == START / 2
    assert all(scale.update(1.0) for _ in range(GROW_EVERY))
    assert scale.value == START
    other = LossScale(enabled=True)
    other.load(scale.state())
    assert other.value == scale.value
    off = LossScale(enabled=False)
    assert off.update(math.inf), "without scaling an overflow is an error, told by the engine"
    assert off.value == 1


def test_codes_are_made_where_the_weights_are() -> None:
    """The source could quantise on a CPU only. Meta tensors show that no step leaves their device."""
    from pipeline_lib.numerics.trits import pack_codes, quantise

    for per_tensor, group in ((True, None), (False, 4)):
        codes, scale = quantise(torch.empty(6, 10, device="meta"), per_tensor=per_tensor, group_size=group)
        assert pack_codes(codes).device.type == scale.device.type == "meta"
