"""How much memory a training took."""

from __future__ import annotations

import resource
import sys

import torch


def peak_memory() -> dict[str, float]:
    """Highest use of this process so far, in MiB: `peak_rss_mib`, and `peak_cuda_mib` where there is a GPU."""
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in KiB on Linux, in bytes on macOS
    figures = {"peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20}
    if torch.cuda.is_available():
        figures["peak_cuda_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return figures
