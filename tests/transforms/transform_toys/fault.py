"""Random sign flips (of floats) or lowest-bit flips (of integers), one element in sixteen; records its masks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pipeline_lib.config.base import Settings as Base
from pipeline_lib.transforms.base import ROLES, Draw, Fault, Site, Transform
from pipeline_lib.transforms.patterns import EVERYWHERE, SitePatterns

if TYPE_CHECKING:
    from torch import Tensor


class Settings(Base):
    """Settings of the toy."""

    type: Literal["toy_fault"] = "toy_fault"
    one_in: int = 16
    sites: SitePatterns = EVERYWHERE


RECORD: list[tuple[str, str, Tensor]] | None = None


class Flip(Fault):
    """See the module."""

    def __init__(self, site: Site, one_in: int) -> None:
        self.site, self.one_in, self.roles = site, one_in, frozenset(ROLES[site.kind])

    def __call__(self, tensor: Tensor, role: str, draw: Draw) -> Tensor:
        """Rows × elements of `tensor` hit where a hash of (key, row, element) is 0 modulo `one_in`."""
        if not self.one_in:
            return tensor
        hit = mask(tensor, draw, self.one_in)
        if RECORD is not None:
            RECORD.append((self.site.name, role, hit.clone()))
        import torch

        if tensor.is_floating_point():
            return torch.where(hit, -tensor, tensor)
        return tensor ^ hit.to(tensor.dtype)


def mask(tensor: Tensor, draw: Draw, one_in: int) -> Tensor:
    """Boolean, in the shape of `tensor`."""
    import torch

    rows = draw.first_row + torch.arange(tensor.shape[0], device=tensor.device)
    elements = draw.first_element + torch.arange(tensor[0].numel(), device=tensor.device)
    hashed = mix(mix(mix(draw.key) + rows[:, None]) + elements[None])
    return (hashed.remainder(one_in) == 0).view(tensor.shape)


def mix(x: Tensor) -> Tensor:
    """A 64-bit finalizer (multiply and xor-shift, wrapping)."""
    x = (x ^ (x >> 31)) * 0x7FB5D329728EA185
    x = (x ^ (x >> 27)) * -0x7E25210B43D22BB3
    return x ^ (x >> 33)


class Toy(Transform):
    """The transform."""

    def fault(self, site: Site) -> Fault:
        """A `Flip` on every role."""
        assert isinstance(self.settings, Settings)
        return Flip(site, self.settings.one_in)


def build(settings: Settings) -> Transform:
    """The transform of these settings."""
    return Toy(settings)
