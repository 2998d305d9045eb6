"""A transform that changes nothing and notes the dtype of what it is given, by site and role."""

from __future__ import annotations

from typing import Any, Literal

from pipeline_lib.config.base import Settings as Base
from pipeline_lib.transforms.base import ROLES, Fault, Site, Transform

SEEN: dict[tuple[str, str], set[str]] = {}


class Settings(Base):
    """No settings."""

    type: Literal["recorder"] = "recorder"


def build(settings: Settings) -> Transform:
    """The transform."""

    class Recorder(Transform):
        kinds = frozenset({"linear"})

        def fault(self, site: Site) -> Fault:
            return _Note(site)

    return Recorder(settings)


class _Note(Fault):
    def __init__(self, site: Site) -> None:
        self.site, self.roles = site, frozenset(ROLES[site.kind])

    def __call__(self, tensor: Any, role: str, draw: Any) -> Any:
        SEEN.setdefault((self.site.name, role), set()).add(str(tensor.dtype))
        return tensor
