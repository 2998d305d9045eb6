"""What training a model takes: all weights, LoRA, ReLoRA and ReLoRA on ternary weights, on the same work, in one table.

Nothing is learned: each arm trains a copy of the model for two steps on random tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from pipeline_lib.config.base import Settings as Base
from pipeline_lib.evaluation.base import Outcome, Subject

Arm = Literal["full", "lora", "relora", "relora_ternary"]


class Settings(Base):
    """The work, which is alike for all arms."""

    type: Literal["memory"] = "memory"
    arms: tuple[Arm, ...] = Field(
        ("full", "lora", "relora", "relora_ternary"),
        min_length=1,
        description="full: all weights train; lora: adapters alone; relora: adapters and what has none; "
        "relora_ternary: the same on packed ternary weights",
    )
    micro_batch: int = Field(4, gt=0, description="sequences a forward pass")
    accumulation: int = Field(2, gt=0, description="forward passes an optimizer step")
    seq_len: int = Field(128, ge=2, description="tokens a sequence")
    rank: int = Field(128, gt=0, description="rank of the adapters, or the full rank where that is less")
    base: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="dtype of frozen weights that are not packed")
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="dtype of the matrix products (autocast)")
    activation_checkpointing: Literal["none", "full"] = Field("none", description="recompute blocks in backward")
    ternary: dict[str, Any] = Field({}, description="settings of the transform of relora_ternary")


def needs(settings: Settings) -> list[dict[str, Any]]:
    """No hub files."""
    return []


def refuses(settings: Settings, model_family: str) -> str | None:
    """Why this task makes no sense for a family of models, or None."""
    return None


def open_task(settings: Mapping[str, Any], inputs: Mapping[str, Path], scratch: Path) -> MemoryTask:
    """The task; it has no data."""
    return MemoryTask(Settings.model_validate(settings))


class MemoryTask:
    """See the module."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def run(self, subject: Subject, seed: int) -> Outcome:
        """Each arm's components, their sum, and the measured peak, MiB; `share` is of the arm `full`, measured.

        A model that is transformed already keeps its transform in every arm, and its frozen weights are packed where
        that can; then there is no arm of its own for ternary weights.
        """
        from pipeline_lib.evaluation.training_memory import measure

        settings = self.settings
        arms = [arm for arm in settings.arms if subject.context is None or arm != "relora_ternary"]
        metrics: dict[str, float] = {}
        measured = {arm: measure(subject, arm, settings, seed) for arm in arms}
        for arm, found in measured.items():
            account = found.account
            figures = account.figures() | {"stated": account.total(settings.accumulation > 1) / 2**20}
            metrics |= {f"{arm}.{name}": value for name, value in figures.items()}
            metrics[f"{arm}.measured"] = found.peak / 2**20
            if "full" in measured:
                metrics[f"{arm}.share"] = found.peak / measured["full"].peak
        work = settings.model_dump(include={"micro_batch", "accumulation", "seq_len", "precision"})
        return Outcome(metrics, {}, settings.micro_batch * settings.accumulation, work)
