"""Quantisation-aware distillation: the transformed model learns the outputs of a full-precision teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from pipeline_lib.config.base import operational
from pipeline_lib.data.prompts import TeacherData
from pipeline_lib.training.settings import Positive, Share, TrainingSettings

if TYPE_CHECKING:
    from pipeline_lib.artifacts.job import Job
    from pipeline_lib.training.hooks import Hooks

ENGINE = "loop"
LAYOUT = "hf"
NEEDS = ("from", "teacher")
READS = "records"
"""It trains on the teacher's records, not on token shards."""


class Settings(TrainingSettings):
    """A student under its transform learns what its frozen teacher makes of the teacher's own answers."""

    type: Literal["distill"] = "distill"
    data: TeacherData = Field(
        TeacherData.model_validate({}), description="what the teacher is asked and how its answers are sampled"
    )
    lr: Positive = Field(8e-6, description="peak learning rate")
    decay: Literal["linear", "cosine", "constant"] = Field("constant", description="shape of the decay after warm-up")
    loss: Literal["cakld", "forward", "reverse", "jsd", "tlsd", "ce"] = Field(
        "cakld", description="divergence between teacher and student, per token; ce learns the records alone"
    )
    temperature: Positive = Field(1.0, description="both models' logits are divided by it")
    jsd_beta: float = Field(0.5, gt=0, lt=1, description="jsd: the teacher's share of the mixture")
    gamma: float | None = Field(
        None, ge=0, le=1, description="cakld: weight of KL(student‖teacher); null: the teacher's mean probability of "
        "the answers' tokens"
    )  # fmt: skip
    gamma_batches: int = Field(10, ge=1, description="cakld: global batches over which that mean is taken")
    mask_prompt: bool = Field(True, description="learn the answers only; false: the prompts' tokens too")
    valid_share: Share = Field(0.2, description="share of the records kept for validation")
    freeze: tuple[str, ...] = Field(
        (), description="patterns of parameters that do not train; where teacher and student start from the same "
        "checkpoint they are held once, e.g. [model.embed_tokens.*, lm_head.*]"
    )  # fmt: skip
    variant: Literal["corrected", "original"] = Field(
        "corrected",
        description="original: as BitDistiller's published code weighs tokens, for comparison: prompts are learnt, "
        "losses are summed over a sequence, gamma is 11/10 of the mean largest probability of all positions, padding "
        "counts in tlsd",
    )
    chunk: int = Field(128, ge=1, description="positions whose logits are held at a time")
    valid_every: int | None = operational(None, "steps between validations; null: only at the end", ge=1)

    @model_validator(mode="after")
    def _original(self) -> Settings:
        if self.variant == "original" and self.gamma is not None:
            raise ValueError("variant original estimates gamma itself: remove gamma")
        return self


def refuses(model_family: str, transform_types: Sequence[str]) -> str | None:
    """Why this recipe makes no sense for a model and its transforms, or None."""
    if model_family == "bert":
        return "teacher and student are decoders: use a llama or a hub decoder"
    return None


def hooks(settings: Settings, job: Job) -> Hooks:
    """The student's loss against its teacher, on teacher records."""
    from pipeline_lib.training.distillation import DistillHooks

    return DistillHooks(settings, job)
