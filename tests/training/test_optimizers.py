"""Lion and Sophia-G: steps worked by hand, and a library's numbers."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

from pipeline_lib.training.optimizers import Lion, SophiaG
from tests.training import optimizer_reference as reference

LIBRARY = json.loads(reference.FILE.read_text(encoding="utf-8"))


def scalar(value: float, gradient: float) -> nn.Parameter:
    parameter = nn.Parameter(torch.tensor([value], dtype=torch.float64))
    parameter.grad = torch.tensor([gradient], dtype=torch.float64)
    return parameter


def test_lion_by_hand() -> None:
    parameter = scalar(2.0, -4.0)
    optimizer = Lion([parameter], lr=0.1, betas=(0.9, 0.99), weight_decay=0.5)
    optimizer.step()  # m = 0: the sign of -0.4; decay first: 2·0.95 + 0.1
    assert parameter.item() == pytest.approx(2.0, abs=1e-12)
    assert optimizer.state[parameter]["exp_avg"].item() == pytest.approx(-0.04, abs=1e-12)
    parameter.grad = torch.tensor([0.3], dtype=torch.float64)
    optimizer.step()  # 0.9·-0.04 + 0.1·0.3 = -0.006: the sign of the mixture, not of the gradient
    assert parameter.item() == pytest.approx(2.0 * 0.95 + 0.1, abs=1e-12)
    assert optimizer.state[parameter]["exp_avg"].item() == pytest.approx(0.99 * -0.04 + 0.01 * 0.3, abs=1e-12)
    parameter.grad.zero_()
    optimizer.state[parameter]["exp_avg"].zero_()
    optimizer.step()  # nothing pulls: decay alone
    assert parameter.item() == pytest.approx(2.0 * 0.95, abs=1e-12)


def test_sophia_by_hand() -> None:
    parameter = scalar(1.0, 0.5)
    optimizer = SophiaG([parameter], lr=0.1, betas=(0.9, 0.5), rho=0.25, batch=8, weight_decay=0.5)
    optimizer.step()  # no Hessian yet: the sign's step, 1·0.95 - 0.1
    assert parameter.item() == pytest.approx(0.85, abs=1e-12)
    parameter.grad = torch.tensor([0.2], dtype=torch.float64)  # of a sampled loss
    optimizer.update_hessian()  # h = 0.5·0 + 0.5·0.04
    assert optimizer.state[parameter]["hessian"].item() == pytest.approx(0.02, abs=1e-15)
    assert parameter.item() == pytest.approx(0.85, abs=1e-12), "a Hessian step moves no weight"
    parameter.grad = torch.tensor([-0.6], dtype=torch.float64)
    optimizer.step()  # m = 0.9·0.05 - 0.06 = -0.015; ρ·B·h = 0.04: 3/8 of the rate, not clipped
    assert parameter.item() == pytest.approx(0.85 * 0.95 + 0.1 * 0.375, abs=1e-12)
    parameter.grad = torch.tensor([10.0], dtype=torch.float64)
    optimizer.step()  # far above the threshold: clipped to the rate
    assert parameter.item() == pytest.approx((0.85 * 0.95 + 0.0375) * 0.95 - 0.1, abs=1e-12)


def test_a_parameter_without_gradient_is_left_alone() -> None:
    for kind in (Lion, SophiaG):
        parameter = nn.Parameter(torch.ones(2))
        optimizer: Any = kind([parameter], lr=0.1, weight_decay=0.5)
        optimizer.step()
        assert torch.equal(parameter, torch.ones(2))
        assert not optimizer.state


@pytest.mark.parametrize("name", ["lion", "sophia"])
def test_as_the_library_does(name: str) -> None:
    parameters = reference.start()
    groups = [
        {"params": parameters[:1], "weight_decay": reference.DECAY},
        {"params": parameters[1:], "weight_decay": 0.0},
    ]
    if name == "lion":
        optimizer: Any = Lion(groups, **reference.LION)
    else:
        optimizer = SophiaG(groups, **reference.SOPHIA, rho=reference.RHO, batch=reference.BATCH)
    for step in range(reference.STEPS):
        for group in optimizer.param_groups:
            group["lr"] = reference.rate(step)
        if name == "sophia" and step % reference.HESSIAN_EVERY == 0:
            for parameter, gradient in zip(parameters, reference.gradients("sampled", step), strict=True):
                parameter.grad = gradient
            optimizer.update_hessian()
        for parameter, gradient in zip(parameters, reference.gradients("loss", step), strict=True):
            parameter.grad = gradient
        optimizer.step()
    moved = [parameter.flatten().tolist() for parameter in parameters]
    assert moved == [pytest.approx(values, rel=1e-5, abs=1e-7) for values in LIBRARY[name]]
    still = [parameter.flatten().tolist() for parameter in reference.start()]
    assert still != [pytest.approx(values, rel=1e-3) for values in LIBRARY[name]], "the file shows something"
