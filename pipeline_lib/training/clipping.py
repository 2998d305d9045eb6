"""Weight clipping: a projection of weights onto [-w_max, w_max] after every optimizer step.

A defence against bit errors: values of a narrow range leave less room for large errors, and a zero-out threshold can
lie closer to them (Stutz et al., Bit error robustness for energy-efficient DNN accelerators, MLSys 2021, section 4.2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from pipeline_lib.config.errors import UserError
from pipeline_lib.transforms.base import Kind, Site
from pipeline_lib.transforms.patterns import matches


class WeightClipping:
    """Clamps chosen weights, in place; those of a model that is transformed, sharded or compiled already, too.

    Args:
        limits: (pattern, w_max) pairs of `TrainingSettings.clip_weights`; None clips nothing. The weights are those of
            linear layers and embeddings, and the first pattern that matches one decides.
        canonical: from module paths of this model to Hugging Face's; None if they are the same.

    Raises:
        UserError: a pattern decides about no weight.
    """

    def __init__(
        self,
        model: nn.Module,
        limits: Sequence[tuple[str, float | None]] | None,
        canonical: Callable[[str], str] | None = None,
    ) -> None:
        self.weights: list[tuple[nn.Parameter, float]] = []
        limits = limits or ()
        unused = {pattern for pattern, _ in limits}
        sites = _weights(model, canonical) if limits else []
        for site, weight in sites:
            pattern, limit = next(((p, w_max) for p, w_max in limits if matches(p, site)), (None, None))
            unused.discard(pattern or "")
            if limit is not None:
                self.weights.append((weight, limit))
        if unused:
            raise UserError(
                "the pattern decides about no weight (the first match wins)",
                where="recipe.clip_weights",
                value=min(unused),
                allowed=f"patterns on {', '.join(site.name for site, _ in sites[:24])}",
                fix="compare the pattern with the names above; * crosses dots",
            )

    @torch.no_grad()
    def __call__(self) -> None:
        """Project the weights; elementwise, so each rank clamps its own shards."""
        for weight, limit in self.weights:
            weight.clamp_(-limit, limit)


def _weights(model: nn.Module, canonical: Callable[[str], str] | None) -> list[tuple[Site, nn.Parameter]]:
    name_of = canonical or (lambda path: path)
    found: list[tuple[Site, nn.Parameter]] = []
    for path, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            kind: Kind = "linear" if isinstance(module, nn.Linear) else "embedding"
            weight = module.get_parameter("weight")
            found.append((Site(kind, name_of(path), tuple(weight.shape)), weight))
    return found
