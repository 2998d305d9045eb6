"""fp32 master weights on the host, their rows shared out over the ranks, and their files in a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline_lib.artifacts.files import sync
from pipeline_lib.training import distributed

_NAME = re.compile(r"masters-(\d+)-of-(\d+)\.safetensors")


class RowShares:
    """Rows of a matrix over all ranks, as FSDP2 shares them out: ⌈n / ranks⌉ each, the last ones fewer."""

    def span(self, rows: int) -> tuple[int, int]:
        """[first, last) of this rank's rows."""
        each = -(-rows // distributed.world())
        return min(distributed.rank() * each, rows), min((distributed.rank() + 1) * each, rows)

    def add(self, values: list[float]) -> list[float]:
        """Sums over the ranks."""
        return distributed.total(values)

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all ranks, in order, on every rank; on the CPU where there are several."""
        if distributed.world() == 1:
            return rows
        counts = [0] * distributed.world()
        counts[distributed.rank()] = len(rows)
        counts = [int(count) for count in distributed.total([float(count) for count in counts])]
        padded = rows.new_zeros(max(counts), *rows.shape[1:], device="cpu")
        padded[: len(rows)] = rows.cpu()
        gathered = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(gathered, padded)
        return torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)])


def save_masters(directory: Path, masters: Mapping[str, Tensor]) -> None:
    """Write this rank's rows into a checkpoint; it counts once the checkpoint is sealed, after all ranks are done."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"masters-{distributed.rank():05d}-of-{distributed.world():05d}.safetensors"
    save_file({name: masters[name] for name in sorted(masters)}, path)
    sync(path)


def load_masters(directory: Path, masters: Mapping[str, Tensor], rows: Mapping[str, int]) -> None:
    """Put saved rows back, in place, whatever the number of ranks that wrote them.

    Args:
        rows: of each whole matrix.

    Raises:
        ValueError: files are missing, or hold other matrices.
    """
    found = sorted(path for path in directory.iterdir() if _NAME.fullmatch(path.name))
    counts = {int(match[2]) for path in found if (match := _NAME.fullmatch(path.name))}
    if counts != {len(found)}:
        raise ValueError(f"{directory}: master weights are incomplete: {[path.name for path in found]}")
    shares, begun = RowShares(), dict.fromkeys(masters, 0)
    for path in found:
        with safe_open(path, "pt") as file:
            if set(file.keys()) != set(masters):
                raise ValueError(f"{path} and the model differ in {sorted(set(file.keys()) ^ set(masters))[:5]}")
            for name, own in masters.items():
                part = file.get_slice(name)
                count = part.get_shape()[0]
                (first, last), start = shares.span(rows[name]), begun[name]
                low, high = max(first, start), min(last, start + count)
                if low < high:
                    own[low - first : high - first] = part[low - start : high - start]
                begun[name] += count
    if begun != dict(rows):
        raise ValueError(f"{directory}: master weights have {begun} rows, not {dict(rows)}")
