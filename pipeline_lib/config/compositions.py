"""What can be known of a composition of transforms before there is a model: at a layer there is one of each kind."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

from pipeline_lib.config.base import Settings
from pipeline_lib.config.errors import UserError
from pipeline_lib.config.registry import TRANSFORMS

_DECODER = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj")
LAYERS = {
    "llama": _DECODER,
    "mistral": _DECODER,
    "bert": ("bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.0.output.dense"),
}
"""Family → linear layers that each of its models has."""


def check_composition(family: str, transforms: Mapping[str, Settings], where: str) -> None:
    """Refuse two transforms that both hold, or both multiply, the weight of a layer that the model is known to have.

    What only the model itself can tell (a pattern that matches nothing, a clash at a layer of its own) is refused
    where the composition is applied.

    Raises:
        UserError: they cannot be combined.
    """
    for layer in LAYERS.get(family, ()):
        at: dict[str, str] = {}
        for name, settings in transforms.items():
            if not _acts_at(settings, layer):
                continue
            module = TRANSFORMS.load(settings.semantic()["type"])
            for kind in getattr(module, "AT_LINEAR", ()):
                if kind in at:
                    raise UserError(
                        f"{at[kind]} and {name} cannot be combined at one layer: a layer has one {kind}",
                        where=where,
                        value="+".join(transforms),
                        fix=f"choose one of them, or give them different `sites`; both act at {layer}",
                    )
                at[kind] = name


def _acts_at(settings: Settings, layer: str) -> bool:
    for pattern, overrides in getattr(settings, "sites", ()):
        if fnmatchcase(layer, pattern.removeprefix("linear:")):
            return overrides is not None
    return False
