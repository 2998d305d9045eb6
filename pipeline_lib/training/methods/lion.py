"""Lion in place of AdamW (Chen et al., 2023, arXiv 2302.06675), with the settings of Kaddour et al., 2023."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from pipeline_lib.config.base import Settings as Base
from pipeline_lib.training.methods import Method
from pipeline_lib.training.settings import Positive, Share

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from pipeline_lib.artifacts.job import Job

OPTIMIZER = True


class Settings(Base):
    """Steps of one length, in the direction of a momentum's sign."""

    type: Literal["lion"] = "lion"
    lr: Positive = Field(1e-4, description="peak learning rate, in place of the recipe's")
    betas: tuple[Share, Share] = Field((0.9, 0.99), description="share of the momentum in the step, and its decay")
    weight_decay: float = Field(0.1, ge=0, description="decoupled weight decay, in place of the recipe's")


def method(settings: Settings, job: Job) -> Method:
    """The method."""
    return LionMethod(settings, job)


class LionMethod(Method):
    """Brings the optimizer."""

    def __init__(self, settings: Settings, job: Job) -> None:
        super().__init__(settings, job)
        self.lr = settings.lr

    def optimizer(self, matrices: list[Tensor], others: list[Tensor]) -> Optimizer:
        """Lion; what decays is the recipe's choice."""
        from pipeline_lib.training.optimizers import Lion, decay_groups

        own = self.settings
        return Lion(decay_groups(matrices, others, own.weight_decay), lr=own.lr, betas=own.betas)
