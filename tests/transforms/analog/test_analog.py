"""Transform `analog`: tiles, converters and devices by hand; what is drawn once a chip and what at each step."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline_lib.config.errors import UserError
from pipeline_lib.transforms.analog.settings import Settings
from pipeline_lib.transforms.apply import Applied, apply

SILENT: dict[str, Any] = {"programming_noise": 0, "read_noise": 0, "drift": 0}
EXACT: dict[str, Any] = {**SILENT, "dac_bits": None, "adc_bits": None}
DAY = 86400.0


def analog(model: nn.Module, step: int = 0, **settings: Any) -> Applied:
    applied = apply(model, [{"type": "analog", "sites": {"*": {}}, **settings}], seed=0)
    applied.context.begin(step, 0)
    return applied


def linear(outputs: int = 17, features: int = 23, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(features, outputs, bias=bias)


def read(weight: Tensor, step: int = 0, seed: int = 0, **settings: Any) -> Tensor:
    """The weight as a layer reads it: its outputs for unit inputs, with exact converters."""
    model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    model[0].weight.data.copy_(weight)
    applied = apply(model, [{"type": "analog", "sites": {"*": {}}, **EXACT, **settings}], seed=seed)
    applied.context.begin(step, 0)
    with torch.no_grad():
        return model(torch.eye(weight.shape[1])).t()


@pytest.mark.parametrize("tile_size", [512, 8, 5, 1])
def test_without_noise_and_converters_it_is_the_exact_layer(tile_size: int) -> None:
    model, exact = nn.Sequential(linear()), linear()
    analog(model, tile_size=tile_size, **EXACT)
    x = torch.randn(4, 3, 23, requires_grad=True)
    torch.testing.assert_close(model(x), exact(x))
    for layer in (model, exact):
        layer(x).square().sum().backward()
    torch.testing.assert_close(model[0].weight.grad, exact.weight.grad)
    torch.testing.assert_close(model[0].bias.grad, exact.bias.grad)


def test_converters_act_on_every_tile_by_itself() -> None:
    """By hand, tile after tile: inputs scaled a token, sums in the units of one device, digital from there on."""
    size, dac, adc, limit = 8, 4, 5, 3.0
    model = nn.Sequential(linear())
    weight, bias = model[0].weight.detach().double(), model[0].bias.detach().double()
    weight[8:16, 16:] = 0  # a tile without a conductance
    model[0].weight.data.copy_(weight)
    analog(model, tile_size=size, dac_bits=dac, adc_bits=adc, adc_range=limit, **SILENT)
    x = torch.randn(5, 23)
    x[2, :8] = 0  # a tile without an input
    expected = bias.expand(5, 17).clone()
    for token in range(5):
        for first in range(0, 23, size):
            piece = x[token, first : first + size].double()
            top = float(piece.abs().max()) or 1.0
            told = torch.round(piece / top * 7) / 7
            for row in range(17):
                tile = weight[row // size * size : row // size * size + size, first : first + size]
                largest = float(tile.abs().max()) or 1.0
                current = float(told @ (weight[row, first : first + size] / largest))
                code = max(-15, min(15, round(current / limit * 15)))
                expected[token, row] += code / 15 * limit * top * largest
    torch.testing.assert_close(model(x[:, None])[:, 0].double(), expected, rtol=1e-5, atol=1e-5)


def test_a_sum_beyond_the_range_saturates() -> None:
    model = nn.Sequential(nn.Linear(64, 1, bias=False))
    model[0].weight.data.fill_(0.5)
    analog(model, adc_range=12.0, **SILENT)
    assert float(model(torch.ones(1, 1, 64)).detach()) == pytest.approx(12 * 0.5)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("share", "deviation"), [(1.0, 1.05538), (0.5, 0.952705), (0.25, 0.68141125)])
def test_programming_misses_by_what_is_published(share: float, deviation: float, sign: int) -> None:
    """0.26348 + 1.965 g − 1.1731 g² µS of 25, g the magnitude; the device of the pair that conducts nothing misses too."""
    weight = torch.full((100, 400), sign * share)
    weight[:, 0] = 1.0  # each row has the largest conductance
    found = sign * read(weight, **{**EXACT, "programming_noise": 1.0})[:, 1:]
    zero = 0.26348 / 25  # this one's misses are cut off below 0
    mean, variance = share - zero / math.sqrt(2 * math.pi), (deviation / 25) ** 2 + zero**2 * (0.5 - 0.5 / math.pi)
    n = found.numel()
    assert abs(float(found.double().mean()) - mean) < 4 * math.sqrt(variance / n)
    assert float(found.double().var()) == pytest.approx(variance, rel=4 * math.sqrt(2 / n) * 1.5)


def test_a_chip_is_the_same_at_every_step_and_another_seed_is_another_chip() -> None:
    weight = torch.randn(20, 30)
    noise = {"programming_noise": 1.0, "drift": 1.0, "time": DAY}
    chip = read(weight, **noise)
    assert not torch.equal(chip, weight)
    assert torch.equal(read(weight, step=7, seed=5, **noise), chip)
    assert not torch.equal(read(weight, chip_seed=1, **noise), chip)


def test_layers_are_different_parts_of_a_chip() -> None:
    model = nn.Sequential(linear(8, 8, bias=False), linear(8, 8, bias=False))
    analog(model, **{**EXACT, "programming_noise": 1.0})
    eye = torch.eye(8)[:, None]
    assert torch.equal(model[0].weight, model[1].weight)
    assert not torch.equal(model[0](eye), model[1](eye))


def test_reading_is_disturbed_anew_at_each_step() -> None:
    """1/f noise: min(0.0088 g^−0.65, 0.2) · √ln((t + t_read) / 2 t_read), t = 20 s with t_read = 250 ns; 3.7 % at 1."""
    weight = torch.ones(100, 400)
    first, again, later = (read(weight, step=step, **{**EXACT, "read_noise": 1.0}) for step in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, later)
    both = torch.stack([first.flatten(), later.flatten()]).double()
    expected, n = 0.0088 * math.sqrt(math.log(20.00000025 / 5e-7)), both.shape[1]
    assert both.std(1).tolist() == pytest.approx([expected] * 2, rel=4 / math.sqrt(2 * n))
    assert torch.corrcoef(both)[0, 1].abs() < 4 / math.sqrt(n)
    assert (read(torch.eye(30), **{**EXACT, "read_noise": 1.0})[~torch.eye(30, dtype=torch.bool)] == 0).all()


def test_conductances_drift_and_outputs_are_scaled_up_for_it() -> None:
    """Exponents of mean 0.049 and deviation 0.008 at g = 1, the published limits."""
    weight, drift = torch.ones(100, 400), {**EXACT, "drift": 1.0}
    assert torch.equal(read(weight, **drift), weight), "no time, no drift"
    left = read(weight, time=DAY, drift_compensation=False, **drift).double()
    nu = -left.log() / math.log((DAY + 20) / 20)
    n = nu.numel()
    assert float(nu.mean()) == pytest.approx(0.049, abs=4 * 0.008 / math.sqrt(n))
    assert float(nu.std()) == pytest.approx(0.008, rel=4 / math.sqrt(2 * n))
    up = read(weight, time=DAY, **drift).double()
    torch.testing.assert_close(up / left, torch.full_like(up, ((DAY + 20) / 20) ** 0.049), rtol=1e-5, atol=0)
    small = torch.cat([torch.full((100, 400), 0.01), torch.ones(100, 1)], 1)  # 0.01: mean 0.0244 + 0.0155 ln 100
    left = read(small, time=DAY, drift_compensation=False, **drift).double()[:, :400] / 0.01
    nu = -left.log() / math.log((DAY + 20) / 20)
    assert float(nu.mean()) == pytest.approx(0.0244 + 0.0155 * math.log(100), abs=4 * 0.045 / math.sqrt(n))


@pytest.mark.parametrize("dac_bits", [None, 4])
def test_the_gradient_is_that_of_the_weights_as_they_are_read(dac_bits: int | None) -> None:
    model = nn.Sequential(linear(bias=False))
    applied = analog(model, tile_size=8, dac_bits=dac_bits, adc_bits=6, time=DAY, drift_compensation=False)
    site = applied.at[0][1]
    stored = site.faulty(site.encode(model[0].weight.detach(), "weight"), "weight")
    weight = site.decode(None, stored, "weight").requires_grad_()
    assert not torch.allclose(weight, model[0].weight, rtol=1e-3)
    x, up = torch.randn(4, 3, 23, requires_grad=True), torch.randn(4, 3, 17)
    y, exact = model(x), nn.functional.linear(x, weight)
    assert not torch.allclose(y, exact, rtol=1e-3), "converters round"
    to_x, to_weight = torch.autograd.grad(y, (x, model[0].weight), up)
    exact_to_x, exact_to_weight = torch.autograd.grad(exact, (x, weight), up)
    torch.testing.assert_close(to_x, exact_to_x)
    if dac_bits is None:
        torch.testing.assert_close(to_weight, exact_to_weight)
    else:  # that of the inputs as they are converted: off by half a step of a tile's range at most, for each token
        bound = up.abs().sum((0, 1))[:, None] * x.detach().abs().max() / (2 * 7)
        assert ((to_weight - exact_to_weight).abs() <= bound).all()
        assert not torch.allclose(to_weight, exact_to_weight, rtol=1e-3)


def test_a_weight_of_zero_can_be_trained() -> None:
    model = nn.Sequential(linear(bias=False))
    model[0].weight.data.zero_()
    analog(model, **EXACT)
    model(torch.ones(1, 1, 23)).sum().backward()
    torch.testing.assert_close(model[0].weight.grad, torch.ones(17, 23))


def test_it_compiles_and_autocast_decides_the_dtype() -> None:
    model = nn.Sequential(linear())
    analog(model, time=DAY)
    x = torch.randn(4, 3, 23)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), model(x), rtol=1e-2, atol=1e-2)


def test_only_reading_needs_repetitions() -> None:
    assert Settings().random_faults
    assert not Settings(read_noise=0).random_faults
    assert Settings(read_noise=0, sites={"0": {"read_noise": 1}, "*": {}}).random_faults  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tile_size": 0}, "greater than 0"),
        ({"dac_bits": 1}, "greater than or equal to 2"),
        ({"adc_range": 0}, "greater than 0"),
        ({"time": -1}, "greater than or equal to 0"),
        ({"sites": {"*": {"drift": -1}}}, "greater than or equal to 0"),
        ({"sites": {"*": {"bits": 8}}}, "bits"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        apply(nn.Sequential(linear()), [{"type": "analog", **settings}], seed=0)


def test_patterns_change_tiles_by_layer() -> None:
    model = nn.Sequential(linear(), linear(5, 17))
    applied = analog(model, sites={"0": {"tile_size": 4}, "1": None})
    assert applied.report["layers"] == {"0": ["0:analog:0"]}
    assert applied.report["settings"]["0:analog:0"]["tile_size"] == 4
