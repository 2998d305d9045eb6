"""Sophia-G in place of AdamW (Liu et al., 2023, arXiv 2305.14342), with the settings of Kaddour et al., 2023."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from pipeline_lib.config.base import Settings as Base
from pipeline_lib.training.budget import unfit_count
from pipeline_lib.training.methods import Method
from pipeline_lib.training.settings import Positive, Share

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from pipeline_lib.artifacts.job import Job
    from pipeline_lib.config.schema import Model
    from pipeline_lib.training.curvature import Curvature
    from pipeline_lib.training.recipes.cram import Settings as Recipe

OPTIMIZER = True


class Settings(Base):
    """Steps scaled by a diagonal of the Gauss-Newton matrix, and clipped."""

    type: Literal["sophia-g"] = "sophia-g"
    lr: Positive = Field(1e-3, description="peak learning rate, in place of the recipe's")
    betas: tuple[Share, Share] = Field((0.965, 0.99), description="decay of the momentum and of the Hessian's average")
    rho: Positive = Field(0.04, description="the larger, the fewer elements of a step are clipped")
    weight_decay: float = Field(0.01, ge=0, description="decoupled weight decay, in place of the recipe's")
    batch_tokens: int | None = Field(
        None, gt=0, description="B, by which squared gradients are multiplied; null: the tokens of a global batch"
    )
    hessian_every: int = Field(10, gt=0, description="optimizer steps between estimates, the first before step 0")
    hessian_sequences: int = Field(768, gt=0, description="sequences of fresh text an estimate takes")
    hessian: Literal["logits", "published"] = Field(
        "logits",
        description="labels are sampled from the model's distribution over the vocabulary, at the targets, and the "
        "gradient is averaged over all sequences; published: as in NoTrainNoGain, from hidden states as if they were "
        "logits, at all positions, and only the last 128 sequences count",
    )
    free_updates: bool = Field(False, description="estimates cost the budget nothing (an ablation)")


def refuses(settings: Settings, recipe: Recipe, model: Model) -> str | None:
    """The budget must know what an estimate costs."""
    return (
        None if settings.free_updates else unfit_count(recipe.budget, "hessian_sequences", settings.hessian_sequences)
    )


def method(settings: Settings, job: Job) -> Method:
    """The method."""
    return SophiaMethod(settings, job)


class SophiaMethod(Method):
    """Brings the optimizer, and the estimates that it lives on.

    Attributes:
        estimates: made so far.
        left_out: those that overflowed in fp16.
    """

    curvature: Curvature

    def __init__(self, settings: Settings, job: Job) -> None:
        super().__init__(settings, job)
        self.lr = settings.lr
        self.estimates = self.left_out = 0

    def prepare(self) -> None:
        """Refuse ranks that would have to estimate on different numbers of sequences."""
        from pipeline_lib.training.curvature import Curvature

        self.curvature = Curvature(self.cram, self.loop, self.settings.hessian, self.settings.hessian_sequences)

    def optimizer(self, matrices: list[Tensor], others: list[Tensor]) -> Optimizer:
        """Sophia-G; what decays is the recipe's choice."""
        from pipeline_lib.training.optimizers import SophiaG, decay_groups

        own, batch = self.settings, self.settings.batch_tokens or self.cram.settings.tokens_per_step
        groups = decay_groups(matrices, others, own.weight_decay)
        return SophiaG(groups, lr=own.lr, betas=own.betas, rho=own.rho, batch=batch)

    def before_step(self, step: int) -> None:
        """Take in a new estimate, where one is due."""
        own = self.settings
        if step % own.hessian_every:
            return
        text = self.cram.fresh(own.hessian_sequences)
        layers = len(self.cram.active(step))
        self.cram.work.add("hessian", layers, own.hessian_sequences, free=own.free_updates)
        self.estimates += 1
        self.left_out += not self.curvature.estimate(text, step)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The counts; the Hessian itself is the optimizer's."""
        return {}, {"estimates": self.estimates, "left_out": self.left_out}

    def load(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Take back what `state` gave."""
        self.estimates, self.left_out = values["estimates"], values["left_out"]

    def result(self) -> dict[str, Any]:
        """Which estimator ran, and how often."""
        return {"hessian": self.settings.hessian, "estimates": self.estimates, "left_out": self.left_out}
