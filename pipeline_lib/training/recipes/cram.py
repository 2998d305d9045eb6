"""Training under a small, fixed budget: a decoder on next tokens, an encoder on masked ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from pipeline_lib.config.base import Settings as Base
from pipeline_lib.config.base import added, operational
from pipeline_lib.config.errors import UserError
from pipeline_lib.config.registry import METHODS
from pipeline_lib.config.validate import validate
from pipeline_lib.training.budget import Budget, unfit_reference
from pipeline_lib.training.settings import BUDGETS, Positive, Share, TrainingSettings

if TYPE_CHECKING:
    from pipeline_lib.artifacts.job import Job
    from pipeline_lib.config.schema import Model
    from pipeline_lib.training.hooks import Hooks

ENGINE = "loop"
LAYOUT = "hf"
CHEAPEST = 1.5
"""Text is fetched for so many times the steps of the whole model: methods that leave layers out take more of them."""


def _method(given: Any) -> Any:
    """A name, {name: {setting: value}}, or resolved settings with their `type`."""
    if isinstance(given, Base):
        return given
    if isinstance(given, str):
        given = {"type": given}
    elif isinstance(given, dict) and "type" not in given and len(given) == 1:
        [(name, values)] = given.items()
        given = {"type": name, **(values or {})}
    if not isinstance(given, dict) or "type" not in given:
        raise ValueError(f"{given!r} is no method: give a name, or {{name: {{setting: value}}}}")
    try:
        module = METHODS.load(given["type"], "methods")
        return validate(module.Settings, given, f"methods.{given['type']}")
    except UserError as error:
        raise ValueError(str(error)) from None


MethodSettings = Annotated[SerializeAsAny[Base], BeforeValidator(_method)]


class Settings(TrainingSettings):
    """AdamW on packed text, from random weights or from another experiment's; methods; a budget.

    Under a `budget` the schedule runs over the budget: warmup_fraction is a share of it, and the default is one cycle,
    up for a half and down to nothing for the other.
    """

    budgets: ClassVar[tuple[str, ...]] = (*BUDGETS, "budget")

    type: Literal["cram"] = "cram"
    global_batch: int = Field(1536, gt=0, description="sequences an optimizer step, over all devices and micro-batches")
    seq_len: int = Field(128, ge=2, description="tokens a sequence")
    lr: Positive = Field(1e-3, description="peak learning rate")
    betas: tuple[Share, Share] = Field((0.9, 0.98), description="decay of AdamW's two moments")
    eps: Positive = Field(1e-12, description="AdamW's denominator offset")
    weight_decay: float = Field(0.01, ge=0, description="AdamW's decoupled weight decay, on matrices only")
    max_norm: Positive | None = Field(0.5, description="gradients are scaled down to this global L2 norm; null: never")
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="dtype of the matrix products (autocast; fp16 with loss scaling); weights stay fp32"
    )
    mask_rate: float = Field(0.15, gt=0, lt=1, description="share of tokens an encoder has to predict")
    dropout: Share = Field(0.0, description="dropout probability, also where the model says another")
    split: Literal["train", "holdout"] = added(
        "train", "split of the dataset that is trained on; holdout: for a model that gives others their `losses`"
    )
    methods: tuple[MethodSettings, ...] = Field(
        (), description="efficient-training methods, in order: names, or {name: {setting: value}}"
    )
    budget: Budget | None = added(None, "budget: {rst_hours}, {flops} or {wall_hours}, in place of steps and tokens")
    track_forward_pass_only: bool = added(
        True, "whether passes that only select examples are charged to the budget; false: they are free (an ablation)"
    )
    decay_norms: bool = added(
        False, "as published: the weights of norms decay too, and only biases do not; false: no vector decays"
    )
    valid_every: Positive | None = operational(
        None, "spent between measurements of the validation loss, in the budget's unit; null: none"
    )
    valid_sequences: int = operational(512, "sequences of such a measurement, always the same and masked alike", ge=1)

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.budget is not None and self.warmup_steps is not None:
            raise ValueError(
                f"under a budget nobody knows the steps: give warmup_fraction, not warmup_steps {self.warmup_steps}"
            )
        names = [str(method.type) for method in self.methods]  # type: ignore[attr-defined]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"method {twice[0]} is listed twice")
        optimizers = [name for name in names if getattr(METHODS.load(name), "OPTIMIZER", False)]
        if len(optimizers) > 1:
            raise ValueError(f"methods {' and '.join(optimizers)} each bring an optimizer: keep one")
        return self

    def resolved(self, parameters: int | None = None) -> Self:
        """The same training with its schedule filled in; steps where the budget is counted in them."""
        if self.budget is None:
            return super().resolved(parameters)
        share = 0.5 if self.warmup_fraction is None else self.warmup_fraction
        return self.model_copy(update={"warmup_fraction": share})

    def needed_tokens(self, parameters: int | None) -> int | None:
        """Tokens of text that the training reads, or a little more; None where only the machine knows."""
        read = self._read_for_one_trained()
        if self.budget is None:
            trained = super().needed_tokens(parameters)
            return None if trained is None else math.ceil(trained * read)
        if parameters is None:
            return None
        steps = self.budget.expected_steps(self.global_batch, 6.0 * parameters * self.seq_len)
        return None if steps is None else math.ceil(CHEAPEST * steps * read) * self.tokens_per_step

    def _read_for_one_trained(self) -> float:
        """Sequences that the methods read for each that is trained on."""
        read = 1.0
        for method in self.methods:
            module = METHODS.load(method.type)  # type: ignore[attr-defined]
            read *= module.reads(method, self) if hasattr(module, "reads") else 1.0
        return read


def refuses(model_family: str, transform_types: Sequence[str]) -> str | None:
    """Why this recipe makes no sense for a model and its transforms, or None."""
    return None


def conflicts(settings: Settings, model: Model) -> str | None:
    """Why these settings make no sense for a model of config.yaml, or None."""
    own = model.llama or model.mistral or model.bert
    if settings.budget is not None:
        reason = unfit_reference(
            settings.budget, own.model_dump() if own else {}, settings.global_batch, settings.seq_len
        )
        if reason:
            return reason
    for method in settings.methods:
        name: str = method.type  # type: ignore[attr-defined]
        refusal = getattr(METHODS.load(name), "refuses", None)
        reason = refusal(method, settings, model) if refusal else None
        if reason:
            return f"method {name}: {reason}"
    return None


def hooks(settings: Settings, job: Job) -> Hooks:
    """Next-token or masked-token loss, after the model's kind; methods and the account of their work."""
    from pipeline_lib.training.cram import CramHooks

    return CramHooks(settings, job)
