"""Makes torchtitan importable where there is no accelerator, and says what this process may use.

torchtitan 0.2.2 fixes its device at import, to CUDA when it finds nothing else, and has no setting for it.
`prepare` must therefore run before the first import of torchtitan.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch


class _CpuModule:
    """`torch.cpu` where torchtitan expects a device module such as `torch.cuda`."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    @staticmethod
    def current_device() -> int:
        return 0  # torch.cpu answers "cpu", torchtitan wants an index


def prepare() -> str:
    """Import torchtitan for the accelerator at hand, else for the CPU; the device type ("cuda", "cpu").

    Raises:
        RuntimeError: torchtitan was imported before, for a device that is not there.
    """
    import torch._utils as inner

    found = inner._get_available_device_type()
    if found is None and "torchtitan.tools.utils" not in sys.modules:
        saved = inner._get_available_device_type, inner._get_device_module
        inner._get_available_device_type = lambda: "cpu"
        inner._get_device_module = lambda device_type: _CpuModule()  # type: ignore[assignment]
        try:
            import torchtitan.tools.utils
        finally:
            inner._get_available_device_type, inner._get_device_module = saved
        torchtitan.tools.utils.get_peak_flops = lambda device_name: 0.0  # it would ask lspci about the GPU
    import torchtitan.tools.utils as tools

    if tools.device_type != (found or "cpu"):
        raise RuntimeError("torchtitan was imported before pipeline_lib.training.titan.device.prepare")
    return tools.device_type


def set_threads() -> int:
    """Give torch this process's share of the cores granted to the stage; the number of threads before.

    Granted are the cores of the CPU mask, or OMP_NUM_THREADS where that is less (Snakemake sets it to the
    threads of the rule; torchrun's launcher to the share of one rank).
    """
    before = torch.get_num_threads()
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cores = max(len(os.sched_getaffinity(0)) // ranks, 1) if hasattr(os, "sched_getaffinity") else before
    torch.set_num_threads(min(cores, int(os.environ.get("OMP_NUM_THREADS") or cores)))
    return before


def peak_flops(device: torch.device) -> float | None:
    """Peak dense bf16 FLOP/s of a GPU as torchtitan lists it; None on a CPU."""
    if device.type == "cpu":
        return None
    from torchtitan.tools.utils import get_peak_flops

    return get_peak_flops(torch.cuda.get_device_name(device))
