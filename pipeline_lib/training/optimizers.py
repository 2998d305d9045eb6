"""Lion and Sophia-G.

Written out, since no well-kept library has Sophia-G's update (pytorch_optimizer's SophiaH estimates the Hessian its own
way) and Lion is three lines; the tests compare both with that library's numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

SOPHIA_EPS = 1e-15


def decayed(model: nn.Module, norms: bool) -> tuple[list[Tensor], list[Tensor]]:
    """(trained parameters that decay, those that do not): matrices do; with `norms` all but biases, as published."""
    groups: tuple[list[Tensor], list[Tensor]] = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = "bias" not in name if norms else parameter.ndim >= 2
            groups[not decays].append(parameter)
    return groups


def decay_groups(matrices: list[Tensor], others: list[Tensor], weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups of an optimizer: those that decay, and those that do not."""
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


class Lion(torch.optim.Optimizer):
    """EvoLved sIgn mOmeNtum (Chen et al., 2023, arXiv 2302.06675, algorithm 2).

    With momentum m, gradient g and rate η: θ ← θ·(1 - η·λ) - η·sign(β₁m + (1-β₁)g), then m ← β₂m + (1-β₂)g.
    State: `exp_avg` (m), as the parameter. All is elementwise, so sharded parameters are fine.
    """

    def __init__(
        self, params: Any, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            rate, (beta1, beta2) = group["lr"], group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                momentum = moment(self, parameter, "exp_avg")
                direction = (momentum * beta1).add_(parameter.grad, alpha=1 - beta1).sign_()
                parameter.mul_(1 - rate * group["weight_decay"]).add_(direction, alpha=-rate)
                momentum.mul_(beta2).add_(parameter.grad, alpha=1 - beta2)


class SophiaG(torch.optim.Optimizer):
    """Sophia with the Gauss-Newton-Bartlett estimator (Liu et al., 2023, arXiv 2305.14342, algorithm 3).

    θ ← θ·(1 - η·λ), m ← β₁m + (1-β₁)g, θ ← θ - η·sign(m)·min(|m| / (ρ·B·h + 10⁻¹⁵), 1). No bias correction.
    h is an average of squared gradients ĝ² that `update_hessian` takes in; where it is 0 the step is the sign's.
    State: `exp_avg` (m) and `hessian` (h), as the parameter.

    Args:
        rho: ρ; the larger, the fewer elements are clipped.
        batch: B, tokens over which the sampled loss behind ĝ is thought to be averaged (Bartlett's identity).
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.965, 0.99),
        rho: float = 0.04,
        batch: int = 1,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "rho": rho, "batch": batch, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            rate, (beta1, _) = group["lr"], group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                momentum = moment(self, parameter, "exp_avg")
                momentum.mul_(beta1).add_(parameter.grad, alpha=1 - beta1)
                scale = moment(self, parameter, "hessian") * (group["rho"] * group["batch"]) + SOPHIA_EPS
                parameter.mul_(1 - rate * group["weight_decay"])
                parameter.add_((momentum / scale).clamp_(-1, 1), alpha=-rate)

    @torch.no_grad()
    def update_hessian(self) -> None:
        """Take in the square of the gradients that are there now: h ← β₂h + (1-β₂)ĝ²."""
        for group in self.param_groups:
            beta2 = group["betas"][1]
            for parameter in group["params"]:
                if parameter.grad is not None:
                    moment(self, parameter, "hessian").mul_(beta2).addcmul_(
                        parameter.grad, parameter.grad, value=1 - beta2
                    )


def moment(optimizer: torch.optim.Optimizer, parameter: Tensor, name: str) -> Tensor:
    """A parameter's state of that name; zeros at first."""
    state = optimizer.state[parameter]
    if name not in state:
        state[name] = torch.zeros_like(parameter)
    return state[name]
