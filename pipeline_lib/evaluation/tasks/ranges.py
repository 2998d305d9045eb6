"""How large the operands of each linear layer are, and zero-out thresholds for bit flips that follow from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from pipeline_lib.config.base import Settings as Base
from pipeline_lib.config.errors import UserError
from pipeline_lib.evaluation.base import Arms, Outcome, Subject
from pipeline_lib.evaluation.thresholds import as_jsonl, as_markdown, as_yaml, propose

READABLE = ("jsonl", "md", "yaml")


class Settings(Base):
    """Calibration text, the share of values that counts as the top, and how a threshold follows."""

    type: Literal["ranges"] = "ranges"
    dataset: str = Field(description="one of our datasets, whose text is run through the model")
    split: Literal["train", "valid", "test"] = Field("train", description="split of the dataset")
    sequences: int = Field(32, ge=1, description="windows of text that are run through the model")
    seq_len: int | None = Field(
        None, ge=2, description="tokens of a window; null = the model's positions, at most 2048"
    )
    top: float = Field(1e-3, gt=0, lt=1, description="share of the largest |x| whose lower end is reported")
    threshold: Literal["max", "quantile"] = Field(
        "max", description="what a threshold is proposed from: the largest |x| seen, or the lower end of the top"
    )
    margin: float = Field(1.25, gt=0, description="the proposed threshold over that value")
    layers: str = Field("*.layer*.*", description="pattern of the linear layers, * crosses dots")


def needs(settings: Settings) -> list[dict[str, Any]]:
    """No hub files."""
    return []


def refuses(settings: Settings, model_family: str) -> str | None:
    """Nothing: every model has linear layers."""
    return None


def open_task(settings: Mapping[str, Any], inputs: Mapping[str, Path], scratch: Path) -> RangesTask:
    """The task with its text.

    Args:
        settings: as they stand in a spec.
        inputs: `dataset`, an artifact of the dataset stage.
        scratch: not used.
    """
    checked = Settings.model_validate(settings)
    return RangesTask(checked, inputs["dataset"])


class RangesTask:
    """Calibration text, ready to be run through many models."""

    def __init__(self, settings: Settings, dataset: Path) -> None:
        self.settings, self._dataset = settings, dataset

    def run(self, subject: Subject, seed: int) -> Outcome:
        """Measure one model; see `Task.run`. A transform's faults act behind the point of measurement."""
        from pipeline_lib.evaluation.ranges import digest, measure, windows

        settings = self.settings
        most = getattr(subject.model.config, "max_position_embeddings", None) or 2048
        length = settings.seq_len or min(most, 2048)
        if length > most:
            raise UserError(
                "windows are longer than the model's positions",
                where="task ranges: seq_len",
                value=length,
                allowed=f"up to {most}",
                fix="lower seq_len",
            )
        text_BT = windows(self._texts, subject.tokenizer, settings.sequences, length)
        found = measure(subject, text_BT, settings.layers, settings.top)
        records = [{**record, **propose(record, settings.threshold, settings.margin)} for record in found]
        return Outcome(
            metrics={
                f"{operand}_{name}": max(record[operand][name] for record in records)
                for operand in ("input", "weight")
                for name in ("top", "max")
            },
            sampling_stderr={},
            n_samples=len(text_BT),
            conditions={"text": digest(text_BT), "seq_len": length},
            records=records,
        )

    def _texts(self) -> Any:
        """The documents of the split, one after the other."""
        import pyarrow.parquet as pq

        for path in sorted(self._dataset.glob(f"{self.settings.split}-*.parquet")):
            for batch in pq.ParquetFile(path).iter_batches(256, columns=["text"]):
                yield from batch.column("text").to_pylist()


def readable(settings: Settings, arms: Arms) -> dict[str, str]:
    """A line of JSON and a row of a table a layer; of the clean arm (or the first one), `sites:` to paste."""
    return {
        "jsonl": as_jsonl(arms),
        "md": as_markdown(arms, settings.semantic()),
        "yaml": as_yaml(arms, settings.semantic()),
    }
