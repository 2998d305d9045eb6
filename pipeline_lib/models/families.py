"""The modules that build the families of `config.models`: each has `config`, `build` and `ARCHITECTURE`."""

from __future__ import annotations

from types import ModuleType

from pipeline_lib.config.errors import known
from pipeline_lib.models import bert, llama, mistral

FAMILIES: dict[str, ModuleType] = {"llama": llama, "mistral": mistral, "bert": bert}


def family_module(family: str) -> ModuleType:
    """The module of a family.

    Raises:
        UserError: no such family.
    """
    return FAMILIES[known(family, FAMILIES, "families", "model.family")]
