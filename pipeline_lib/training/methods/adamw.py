"""AdamW, the baseline (Loshchilov and Hutter, 2019, arXiv 1711.05101), with settings of its own where they are given.

Without any it is what a recipe without methods does, bit for bit: a named row beside the other methods.
"""

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
    """AdamW's own settings; null takes the recipe's."""

    type: Literal["adamw"] = "adamw"
    lr: Positive | None = Field(None, description="peak learning rate; null: the recipe's")
    betas: tuple[Share, Share] | None = Field(None, description="decay of the two moments; null: the recipe's")
    eps: Positive | None = Field(None, description="offset of the denominator; null: the recipe's")
    weight_decay: float | None = Field(None, ge=0, description="decoupled weight decay; null: the recipe's")


def method(settings: Settings, job: Job) -> Method:
    """The method."""
    return AdamW(settings, job)


class AdamW(Method):
    """Brings the optimizer."""

    def __init__(self, settings: Settings, job: Job) -> None:
        super().__init__(settings, job)
        self.lr = settings.lr

    def optimizer(self, matrices: list[Tensor], others: list[Tensor]) -> Optimizer:
        """Fused, as the recipe's."""
        import torch

        from pipeline_lib.training.optimizers import decay_groups

        own, recipe = self.settings, self.cram.settings
        return torch.optim.AdamW(
            decay_groups(matrices, others, recipe.weight_decay if own.weight_decay is None else own.weight_decay),
            lr=own.lr or recipe.lr,
            betas=own.betas or recipe.betas,
            eps=own.eps or recipe.eps,
            fused=True,
        )
