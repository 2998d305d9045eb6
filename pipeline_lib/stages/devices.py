"""How many processes a training gets on this machine."""

from __future__ import annotations

from typing import Any


def processes(execution: dict[str, Any]) -> int:
    """As many as `gpus` asks for and the machine has; without a GPU `cpu_processes` (default 1).

    The number changes speed only: data order, masks and the global batch do not depend on it.
    """
    import torch

    if torch.cuda.is_available():
        return max(1, min(int(execution.get("gpus") or 1), torch.cuda.device_count()))
    return int(execution.get("cpu_processes") or 1)
