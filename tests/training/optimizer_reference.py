"""Makes optimizer_reference.json: what pytorch_optimizer does to two tensors in seven steps.

Its numbers are committed, so that the comparison needs no further package; to make them anew:

    pip download --no-deps pytorch_optimizer==4.1.0 && unzip *.whl -d library
    PYTHONPATH=library:. python -m tests.training.optimizer_reference

Its SophiaH takes a Hessian from outside and clips momentum/Hessian at p: with p = 1 and ρ·B·ĝ² as the Hessian that is
Sophia-G's update.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FILE = Path(__file__).with_suffix(".json")
STEPS, DECAY = 7, 0.1
LION: dict[str, Any] = {"betas": (0.9, 0.99)}
SOPHIA: dict[str, Any] = {"betas": (0.965, 0.99)}
RHO, BATCH, HESSIAN_EVERY = 0.04, 50, 3


def rate(step: int) -> float:
    """A learning rate that changes with every step."""
    return 1e-2 / (1 + step)


def start() -> list[torch.nn.Parameter]:
    """A matrix and a vector, fp32."""
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 4), (5,))]


def gradients(kind: str, step: int) -> list[Tensor]:
    """Gradients of a step: of the loss ("loss") or of a sampled one ("sampled")."""
    generator = torch.Generator().manual_seed(1 + step + 100 * (kind == "sampled"))
    return [torch.randn(shape, generator=generator) * 0.3 for shape in ((3, 4), (5,))]


def _run(make: Any, hessian: bool) -> list[list[float]]:
    parameters = start()
    optimizer = make([{"params": parameters[:1], "weight_decay": DECAY}, {"params": parameters[1:], "weight_decay": 0}])
    for step in range(STEPS):
        for parameter, gradient in zip(parameters, gradients("loss", step), strict=True):
            parameter.grad = gradient
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        if hessian and step % HESSIAN_EVERY == 0:
            optimizer.step(hessian=[RHO * BATCH * g.square() for g in gradients("sampled", step)])
        else:
            optimizer.step()
    return [parameter.flatten().tolist() for parameter in parameters]


def main() -> None:
    """Write the file."""
    import pytorch_optimizer  # type: ignore[import-not-found]

    found = {
        "library": "pytorch_optimizer 4.1.0",
        "lion": _run(lambda groups: pytorch_optimizer.Lion(groups, **LION), hessian=False),
        "sophia": _run(
            lambda groups: pytorch_optimizer.SophiaH(groups, **SOPHIA, p=1.0, eps=0.0, update_period=10**9),
            hessian=True,
        ),
    }
    FILE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
