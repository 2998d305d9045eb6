"""Settings that the recipes of the engines `hf` and `loop` share: budget, optimizer, schedule, batching."""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from pipeline_lib.artifacts.job import Job
from pipeline_lib.config.base import Settings, added
from pipeline_lib.transforms.patterns import IN_LAYERS

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]


def _as_limits(given: Any) -> Any:
    """A number for the linear layers, a mapping from patterns, or the list of pairs that a spec holds."""
    if given is None or isinstance(given, (list, tuple)):
        return given
    if isinstance(given, dict) and not given:
        raise ValueError("names no weights: give a number, or a map from patterns to numbers")
    return tuple(given.items()) if isinstance(given, dict) else ((f"linear:{IN_LAYERS}", given),)


Limits = Annotated[tuple[tuple[str, Positive | None], ...] | None, BeforeValidator(_as_limits)]
"""Ordered (pattern, w_max or None = leave alone); the first match wins."""


BUDGETS = ("steps", "tokens", "tokens_per_parameter")


def budget_or(given: dict[str, Any], tokens_per_parameter: float) -> dict[str, Any]:
    """Settings as the user gave them, with this budget where they have none."""
    if all(given.get(name) is None for name in BUDGETS):
        return {**given, "tokens_per_parameter": tokens_per_parameter}
    return given


def option(job: Job, name: str, default: Any) -> Any:
    """How to run: an execution setting, or `default` where it is missing or null."""
    value = job.execution.get(name)
    return default if value is None else value


class TrainingSettings(Settings):
    """AdamW with linear warm-up, then decay; exactly one budget.

    A recipe sets the class attributes to its own defaults and adds its fields.
    """

    default_warmup_fraction: ClassVar[float] = 0.0
    budgets: ClassVar[tuple[str, ...]] = BUDGETS

    steps: int | None = Field(None, gt=0, description="budget: optimizer steps")
    tokens: int | None = Field(None, gt=0, description="budget: training tokens")
    tokens_per_parameter: Positive | None = Field(
        None, description="budget: training tokens per parameter of the model, input embedding not counted"
    )
    global_batch: int = Field(16, gt=0, description="sequences an optimizer step, over all devices and micro-batches")
    seq_len: int = Field(1024, ge=2, description="tokens a sequence")
    lr: Positive = Field(1e-5, description="peak learning rate")
    betas: tuple[Share, Share] = Field((0.9, 0.999), description="decay of AdamW's two moments")
    eps: Positive = Field(1e-8, description="AdamW's denominator offset")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay, on matrices only")
    warmup_fraction: Share | None = Field(None, description="warm-up as a share of the steps, rounded down")
    warmup_steps: int | None = Field(None, ge=0, description="warm-up in optimizer steps; less than all steps")
    decay: Literal["linear", "cosine", "constant"] = Field("linear", description="shape of the decay after warm-up")
    min_lr_factor: float = Field(0.0, ge=0, le=1, description="share of the peak learning rate the decay ends at")
    max_norm: Positive | None = Field(1.0, description="gradients are scaled down to this global L2 norm; null: never")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="dtype of the matrix products (autocast); weights and optimizer state stay fp32"
    )
    fault_devices: int = Field(
        1, gt=0, description="virtual devices: equal shares of the global batch that draw weight faults of their own"
    )

    clip_weights: Limits = added(
        None,
        "w_max: weights are clamped to -w_max … w_max before the first and after every optimizer step; a number for "
        "the linear layers inside the numbered layers, or an ordered map from patterns on layer names to numbers, "
        "null = leave alone",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        given = [name for name in self.budgets if getattr(self, name) is not None]
        if len(given) != 1:
            found = f"the budget is given {len(given)} times ({', '.join(given)})" if given else "there is no budget"
            raise ValueError(f"{found}: give exactly one of {', '.join(self.budgets)}")
        if self.warmup_fraction is not None and self.warmup_steps is not None:
            raise ValueError(
                f"warmup_fraction {self.warmup_fraction} and warmup_steps {self.warmup_steps} are both given: keep one"
            )
        if self.steps is not None and self.warmup_steps is not None and self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} must be less than steps {self.steps}")
        if self.global_batch % self.fault_devices:
            raise ValueError(f"fault_devices {self.fault_devices} must divide global_batch {self.global_batch}")
        return self

    def resolved(self, parameters: int | None = None) -> Self:
        """The same training with `steps` and `warmup_steps` as integers and the other ways to say it unset.

        steps = ceil(tokens / (global_batch · seq_len)): every token of a step counts, on whatever device.

        Args:
            parameters: the model's parameters without its input embedding; needed for tokens_per_parameter only.

        Raises:
            ValueError: the number of parameters is needed and not known, or warm-up would fill all steps.
        """
        steps = self.steps if self.steps is not None else math.ceil(self._tokens(parameters) / self.tokens_per_step)
        warmup = self.warmup_steps
        if warmup is None:
            share = self.default_warmup_fraction if self.warmup_fraction is None else self.warmup_fraction
            warmup = int(steps * share)
        unset = {"tokens": None, "tokens_per_parameter": None, "warmup_fraction": None}
        return type(self)(**{**self.model_dump(), **unset, "steps": steps, "warmup_steps": warmup})

    def needed_tokens(self, parameters: int | None) -> int | None:
        """Tokens of text that the resolved training reads; None where nobody knows before it has run."""
        assert self.steps is not None
        return self.steps * self.tokens_per_step

    @property
    def tokens_per_step(self) -> int:
        """Training tokens an optimizer step, over all devices."""
        return self.global_batch * self.seq_len

    def _tokens(self, parameters: int | None) -> float:
        if self.tokens is not None:
            return self.tokens
        assert self.tokens_per_parameter is not None  # one budget is given
        if parameters is None:
            raise ValueError(
                "tokens_per_parameter needs the model's number of parameters: give it as `parameters` of the model, "
                "or give tokens or steps"
            )
        return self.tokens_per_parameter * parameters
