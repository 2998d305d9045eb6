"""Order and gradients at one site."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transform_toys.fault import mask
from transform_toys.store import Codes

from pipeline_lib.config.errors import UserError
from pipeline_lib.transforms.apply import Applied, apply
from pipeline_lib.transforms.base import ROLES, Draw, Fault, Site
from pipeline_lib.transforms.compose import SiteFunctions
from pipeline_lib.transforms.context import FaultContext
from pipeline_lib.transforms.draws import normals, uniform

ENTRIES = {
    "store": {"type": "toy_store", "levels": 20},
    "fault": {"type": "toy_fault"},
    "compute": {"type": "toy_compute"},
}


def layer() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6))


def by_hand(model: nn.Sequential, applied: Applied, index: int, x: Tensor) -> Tensor:
    """codes → flipped codes → values → twice the product."""
    codec = Codes(Site("linear", "0", (6, 8)), 20)
    loaded = {}
    for role, value in (("weight", model[0].weight.detach()), ("input", x)):
        stored = codec.encode(value, role)
        stream = applied.context.stream("0", f"{role}.codes/{index}")
        applied.context.begin(3, 0)
        codes = stored["codes"] if role == "input" else stored["codes"][None]
        hit = mask(codes, applied.context.activation(stream, codes), 16).view(stored["codes"].shape)
        loaded[role] = codec.decode({**stored, "codes": stored["codes"] ^ hit.to(torch.int8)}, role)
    return 2 * (loaded["input"] @ loaded["weight"].T + model[0].bias)


@pytest.mark.parametrize("order", list(permutations(ENTRIES)), ids="+".join)
def test_store_faults_load_compute_in_any_order_of_the_name(order: tuple[str, ...]) -> None:
    model = layer()
    x = torch.randn(5, 3, 8)
    applied = apply(model, [ENTRIES[name] for name in order], seed=0)
    applied.context.begin(3, 0)
    result = model(x)
    expected = by_hand(model, applied, order.index("fault"), x)
    assert torch.allclose(result, expected, atol=1e-6)
    plain = nn.functional.linear(x, model[0].weight, model[0].bias)
    assert not torch.allclose(result, 2 * plain, atol=1e-3)


def test_any_number_of_faults_in_order() -> None:
    context = FaultContext(0)
    site = Site("embedding", "e", (2, 2))
    log: list[str] = []

    class Note(Fault):
        roles = frozenset({"weight"})

        def __init__(self, name: str) -> None:
            self.name = name

        def __call__(self, tensor: Tensor, role: str, draw: Draw) -> Tensor:
            log.append(self.name)
            return tensor * 2 if self.name == "double" else tensor + 1

    functions = SiteFunctions(site, [(0, Note("double")), (2, Note("add"))], context)
    context.begin(0, 0)
    weight = torch.ones(2, 2)
    assert torch.equal(functions.weight(functions.encode(weight, "weight"), weight, "weight"), torch.full((2, 2), 3.0))
    assert log == ["double", "add"]


def test_straight_through_reaches_the_weight_and_the_input() -> None:
    model = layer()
    apply(model, [ENTRIES["store"]], seed=0)
    x = torch.randn(4, 8, requires_grad=True)
    codec = Codes(Site("linear", "0", (6, 8)), 20)
    loaded = {
        role: codec.decode(codec.encode(value.detach(), role), role).requires_grad_()
        for role, value in (("weight", model[0].weight), ("input", x))
    }
    (loaded["input"] @ loaded["weight"].T).square().sum().backward()
    (model(x) - model[0].bias).square().sum().backward()
    assert torch.allclose(model[0].weight.grad, loaded["weight"].grad, atol=1e-4)
    assert x.grad is not None
    assert loaded["input"].grad is not None
    assert torch.allclose(x.grad, loaded["input"].grad, atol=1e-4)


def test_packed_codes_replace_the_value() -> None:
    site = Site("linear", "l", (2, 2))

    class Packed(Codes):
        def packed(self, role: str) -> dict[str, Tensor] | None:
            return (
                {"codes": torch.tensor([[127, 0], [0, -127]]), "scale": torch.ones(2, 1)} if role == "weight" else None
            )

    functions = SiteFunctions(site, [(0, Packed(site, 127))], FaultContext(0))
    weight = torch.full((2, 2), torch.nan)
    loaded = functions.weight(functions.encode(weight, "weight"), weight, "weight")
    assert torch.equal(loaded, torch.tensor([[1.0, 0.0], [0.0, -1.0]]))


def test_roles_a_site_does_not_have_are_refused() -> None:
    for kind in ("product", "embedding", "kv"):
        site = Site(kind, "s")
        with pytest.raises(UserError, match="roles"):
            SiteFunctions(site, [(0, Codes(Site("linear", "s"), 3))], FaultContext(0))
    SiteFunctions(Site("linear", "s"), [(0, Codes(Site("linear", "s"), 3))], FaultContext(0))
    assert ROLES["linear"] == ("weight", "input")


class InMemory(Codes):
    """Multiplies its codes as they are, and gives their scale to the outputs."""

    in_memory = True
    straight_through = False
    roles = frozenset({"weight"})

    def __init__(self, site: Site, levels: int) -> None:
        super().__init__(site, levels)
        self.roles = frozenset({"weight"})

    def multiply(self, stored: dict[str, Tensor], input: Tensor, bias: Tensor | None) -> Tensor:
        """x·codesᵀ, plus 100 as a sign that it was here."""
        return nn.functional.linear(input, stored["codes"].to(input.dtype)) * stored["scale"][:, 0] + 100


def test_a_store_may_multiply_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets the stored tensors after their faults; the gradient reaches weight and input through it."""
    monkeypatch.setattr("transform_toys.store.Codes", InMemory)
    model = layer()
    applied = apply(model, [{"type": "toy_store", "levels": 0}, ENTRIES["fault"]], seed=0)
    applied.context.begin(3, 0)
    x, weight = torch.randn(2, 1, 8, requires_grad=True), model[0].weight

    def flipped(value: Tensor, draw: Draw) -> Tensor:
        return torch.where(mask(value, draw, 16), -value, value)

    codes = flipped(weight[None], applied.context.weight(applied.context.stream("0", "weight.codes/1"), weight[None]))
    applied.context.begin(3, 0)
    read = flipped(x, applied.context.activation(applied.context.stream("0", "input.value/1"), x))
    applied.context.begin(3, 0)
    assert not torch.equal(codes[0], weight), "codes are hit"
    expected = nn.functional.linear(read, codes[0]) * weight.abs().amax(1) + 100
    torch.testing.assert_close(model(x), expected)
    found = torch.autograd.grad(model(x).sum(), (weight, x))
    for gradient, by_hand in zip(found, torch.autograd.grad(expected.sum(), (weight, x)), strict=True):
        torch.testing.assert_close(gradient, by_hand)
    with pytest.raises(UserError, match="loads no weight for a compute"):
        apply(layer(), [ENTRIES["store"], ENTRIES["compute"]], seed=0)


def test_normals_are_normal_independent_and_placed_by_the_draw() -> None:
    def draw(row: int, element: int, *shape: int) -> tuple[Tensor, Tensor]:
        return normals(Draw(*(torch.tensor(v) for v in (7, row, element))), torch.Size(shape))

    first, second = draw(0, 0, 2, 50_000)
    both = torch.stack([first.flatten(), second.flatten()]).double()
    n = both.shape[1]
    assert (both.mean(1).abs() < 4 / n**0.5).all()
    assert ((both.var(1) - 1).abs() < 4 * (2 / n) ** 0.5).all()
    assert ((both**4).mean(1) - 3).abs().max() < 4 * (96 / n) ** 0.5
    assert torch.corrcoef(both)[0, 1].abs() < 4 / n**0.5
    for part, whole in zip(draw(1, 10, 1, 20), (first, second), strict=True):
        assert torch.equal(part[0], whole[1, 10:30])
    assert not torch.equal(first[0], first[1])


def test_uniform_is_uniform_and_placed_by_the_draw() -> None:
    def at(row: int, element: int, shape: tuple[int, ...], key: int = 5) -> Tensor:
        return uniform(Draw(*(torch.tensor(v) for v in (key, row, element))), torch.Size(shape))

    whole = at(0, 0, (40, 1000))
    assert whole.min() >= 0
    assert whole.max() < 1
    assert abs(whole.mean().item() - 0.5) < 4 * (1 / 12 / 40_000) ** 0.5
    counts = torch.histc(whole, 20, 0, 1)
    assert ((counts - 2000) ** 2 / 2000).sum() < 60  # chi-square with 19 degrees of freedom: 60 is p < 1e-5
    assert torch.equal(at(7, 300, (2, 10, 5)), whole[7:9, 300:350].view(2, 10, 5))
    assert (at(0, 0, (40, 1000), key=6) == whole).float().mean() < 0.001
    far: Any = at(0, 2**32, (1, 100))
    assert not torch.equal(far, whole[:1, :100])
