"""Asymmetric clipping: for each group the range whose quantisation changes the layer's output least.

BitDistiller (Du et al. 2024, arXiv:2402.10631, section 3.1). The sides of a group's range are shrunk independently,
each by 0, 1/grid, 2/grid, … below `max_shrink`; the candidate counts whose error

    mean over tokens t of (sum over c of x[t, c] (w'[c] - w[c]))^2

is smallest, w' being the clipped and quantised group. Of equal candidates the one that shrinks the maximum, then the
minimum, least is taken.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pipeline_lib.numerics.grids import GRIDS, Grid, from_groups, to_groups
from pipeline_lib.transforms.int2.settings import Clip, Settings

CHUNK_ELEMENTS = 2**21  # of the weight that are searched at a time; changes memory, never the result


def factors(clip: Clip) -> list[float]:
    """What a side of the range is multiplied by, the least shrunk first."""
    return [1 - i / clip.grid for i in range(max(1, math.ceil(clip.max_shrink * clip.grid)))]


@torch.no_grad()
def search(
    weight: Tensor, inputs: Tensor, settings: Settings, clip: Clip
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The best ranges of a linear layer.

    Args:
        weight: [out, in] fp32; any number of rows, and of features.
        inputs: [tokens, in] fp32.

    Returns:
        `minimum` and `maximum`, fp32 [out, groups]; and for the report the sum over groups (mean over rows) of the
        error that is minimised, and the mean square error of the layer's output as a share of the output's mean
        square, each before and after clipping.
    """
    size, grid = settings.group_size, GRIDS[settings.format]
    dtype = getattr(torch, settings.scale_dtype)
    roots_Gkg = _roots(_groups_of_inputs(inputs, size))
    rows = max(1, CHUNK_ELEMENTS // weight.shape[1])
    parts = [_search_rows(part, roots_Gkg, grid, dtype, size, clip) for part in weight.split(rows)]
    minimum, maximum, before, after = (torch.cat(found) for found in zip(*parts, strict=True))
    whole = torch.full_like(minimum, math.inf)
    figures = {
        "group_error_before": before.double().sum(1).mean().item(),
        "group_error_after": after.double().sum(1).mean().item(),
        "output_error_before": _output_error(weight, inputs, -whole, whole, grid, dtype, size),
        "output_error_after": _output_error(weight, inputs, minimum, maximum, grid, dtype, size),
    }
    return {"minimum": minimum, "maximum": maximum}, figures


def _groups_of_inputs(inputs: Tensor, size: int) -> Tensor:
    """[tokens, in] -> [groups, tokens, group size]; features beyond the last are zero, so that they weigh nothing."""
    size = inputs.shape[1] if size == -1 else size
    missing = -inputs.shape[1] % size
    return torch.nn.functional.pad(inputs, (0, missing)).unflatten(-1, (-1, size)).transpose(0, 1)


def _roots(inputs_GTg: Tensor) -> Tensor:
    """R [groups, k, g] with ‖R d‖² = mean over tokens of (x · d)² for every d: k is the smaller of tokens and g."""
    tokens = inputs_GTg.shape[1]
    scaled = inputs_GTg / math.sqrt(tokens)
    return torch.linalg.qr(scaled, mode="r").R if tokens > inputs_GTg.shape[2] else scaled


def _search_rows(
    weight: Tensor, roots_Gkg: Tensor, grid: Grid, dtype: torch.dtype, size: int, clip: Clip
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ranges, and errors before and after, each [rows, groups]."""
    groups = to_groups(weight, size)
    lowest, highest = groups.amin(-1), groups.amax(-1)
    best = torch.full_like(lowest, math.inf)
    minimum, maximum, before = lowest.clone(), highest.clone(), best
    for shrink_max in factors(clip):
        for shrink_min in factors(clip):
            low, high = lowest * shrink_min, highest * shrink_max
            error = _errors(groups, low, high, roots_Gkg, grid, dtype)
            if shrink_max == shrink_min == 1:
                before = error
            better = error < best
            best = torch.where(better, error, best)
            minimum, maximum = torch.where(better, low, minimum), torch.where(better, high, maximum)
    return minimum, maximum, before, best


def _errors(groups: Tensor, low: Tensor, high: Tensor, roots_Gkg: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
    """The error of each group under a range; [rows, groups]."""
    change_GRg = (_quantised(groups, low, high, grid, dtype) - groups).transpose(0, 1)
    return torch.bmm(change_GRg, roots_Gkg.transpose(1, 2)).square_().sum(-1).T


def _quantised(groups: Tensor, low: Tensor, high: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
    clipped = groups.clamp(low[..., None], high[..., None])
    parameters = grid.parameters(clipped.amin(-1), clipped.amax(-1), dtype)
    return grid.values(grid.codes(clipped, parameters), parameters)


def _output_error(
    weight: Tensor, inputs: Tensor, low: Tensor, high: Tensor, grid: Grid, dtype: torch.dtype, size: int
) -> float:
    """Mean square error of the layer's output over its mean square, the groups of a row together."""
    quantised = from_groups(_quantised(to_groups(weight, size), low, high, grid, dtype), weight.shape[1])
    exact = inputs @ weight.T
    error = (inputs @ (quantised - weight).T).double().square().mean()
    return (error / exact.double().square().mean().clamp_min(torch.finfo(torch.float64).tiny)).item()
