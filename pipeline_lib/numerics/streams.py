"""Keys of fault streams: who draws (seed, site, role) and when (step).

A site's key is hashed once on the host. A step's key is drawn from it by Philox with the step as counter, on tensors,
so that a compiled model sees no Python integer that changes. Nothing here depends on rank, world size or call order.
"""

from __future__ import annotations

import hashlib
import json

import torch
from torch import Tensor

from pipeline_lib.numerics.philox import LOW, as_signed, philox4x32, philox4x32_int

_STEP_TAG = 0x73746570  # "step": counter word 3, apart from every tag of the flip streams


def site_key(seed: int, site: str, role: str) -> int:
    """The 64-bit key of one tensor's fault stream, in the range of int64.

    The first 8 bytes (little-endian) of the SHA-256 of the JSON list [seed, site, role].
    """
    text = json.dumps([int(seed), site, role], ensure_ascii=True, separators=(",", ":"))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)


def step_key(site_key: int, step: Tensor) -> Tensor:
    """The key of one step: words 0 and 1 of Philox4x32-10 at counter (step low, step high, 0, "step").

    Args:
        site_key: from `site_key`.
        step: 0-d int64 tensor.

    Returns:
        0-d int64 tensor on the step's device. Traceable: under `torch.compile` it is a handful of integer operations.
    """
    if torch.compiler.is_compiling() or type(step) is not Tensor or step.device.type == "meta":
        return _traceable_step_key(site_key, step)
    if step.device.type == "cpu":  # the same in plain integers: 10 µs instead of 200 µs of tiny tensor operations
        at = int(step)
        w0, w1, _, _ = philox4x32_int(at & LOW, at >> 32 & LOW, 0, _STEP_TAG, site_key & LOW, site_key >> 32 & LOW)
        return torch.tensor(as_signed(w0 | w1 << 32))
    if step.device.type == "cuda":
        from pipeline_lib.numerics.flip_kernel import step_key_cuda

        return step_key_cuda(site_key, step, _STEP_TAG)
    return _traceable_step_key(site_key, step)


def _traceable_step_key(site_key: int, step: Tensor) -> Tensor:
    zero = torch.zeros_like(step)
    tag, k0, k1 = zero + _STEP_TAG, zero + (site_key & LOW), zero + (site_key >> 32 & LOW)
    w0, w1, _, _ = philox4x32(step & LOW, (step >> 32) & LOW, zero, tag, k0, k1)
    return w0 | (w1 << 32)
