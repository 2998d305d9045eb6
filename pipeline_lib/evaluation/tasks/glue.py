"""GLUE (Wang et al., 2019): eight tasks an encoder is fine-tuned on, without WNLI; the settings are Cramming's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from pipeline_lib.evaluation import benchmark
from pipeline_lib.evaluation.benchmark import DataSet, FineTuning

if TYPE_CHECKING:
    from pipeline_lib.evaluation.finetuning import FineTuned

SETS = {
    "cola": DataSet(("sentence",), "mcc"),
    "mnli": DataSet(
        ("premise", "hypothesis"), "acc", 3, validation="validation_matched", extra="validation_mismatched"
    ),
    "mrpc": DataSet(("sentence1", "sentence2"), "f1"),
    "qnli": DataSet(("question", "sentence")),
    "qqp": DataSet(("question1", "question2"), "f1"),
    "rte": DataSet(("sentence1", "sentence2")),
    "sst2": DataSet(("sentence",)),
    "stsb": DataSet(("sentence1", "sentence2"), "pearson", 1),
}


class Settings(FineTuning):
    """GLUE_sane of Cramming: 5 epochs, 4e-5."""

    SETS: ClassVar = SETS

    type: Literal["glue"] = "glue"
    repo: str = Field("nyu-mll/glue", description="dataset repository: <data set>/<split>-*.parquet")


def needs(settings: Settings) -> list[dict[str, Any]]:
    """Its data sets on the hub."""
    return benchmark.needs(settings.repo, settings)


refuses = benchmark.refuses


def open_task(settings: Mapping[str, Any], inputs: Mapping[str, Path], scratch: Path) -> FineTuned:
    """The task with its examples read."""
    from pipeline_lib.evaluation.finetuning import FineTuned

    return FineTuned(Settings.model_validate(settings), inputs["asset-0"] / "files")
