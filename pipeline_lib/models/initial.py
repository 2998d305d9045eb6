"""Initial weights of a llama, the same whatever the device, the number of ranks or the order they are drawn in."""

from __future__ import annotations

import hashlib

import torch


def initial_weight(name: str, shape: tuple[int, ...], dim: int, seed: int) -> torch.Tensor:
    """The initial value of one parameter, fp32 on the CPU.

    torchtitan's scheme: embedding N(0, 1); query, key, value and gate projections N(0, 0.02²); the
    projections back into the residual stream and the up projection N(0, σ²), σ = 0.02 / √(2·(layer + 1));
    head N(0, 1/dim), cut at 3σ; norms 1. The projections are cut at ±2, that is, practically never.

    Args:
        name: canonical name of the parameter.
        shape: its full shape, also where it is sharded.
        dim: width of the residual stream.
        seed: the training's seed; every parameter draws from a generator of its own.

    Raises:
        ValueError: no parameter of a llama.
    """
    value = torch.empty(shape, dtype=torch.float32, device="cpu")
    module = name.removesuffix(".weight").rsplit(".", 1)[-1]
    if module.endswith("norm"):
        return value.fill_(1.0)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    if module == "embed_tokens":
        return value.normal_(generator=generator)
    if module == "lm_head":
        std = dim**-0.5
        return torch.nn.init.trunc_normal_(value, std=std, a=-3 * std, b=3 * std, generator=generator)
    if module in ("q_proj", "k_proj", "v_proj", "gate_proj"):
        std = 0.02
    elif module in ("o_proj", "down_proj", "up_proj"):
        layer = int(name.removeprefix("model.layers.").split(".")[0])
        std = 0.02 / (2 * (layer + 1)) ** 0.5
    else:
        raise ValueError(f"{name!r} is no parameter of a llama")
    return torch.nn.init.trunc_normal_(value, std=std, a=-2.0, b=2.0, generator=generator)
