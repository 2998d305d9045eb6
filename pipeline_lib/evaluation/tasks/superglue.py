"""SuperGLUE (Wang et al., 2019): seven tasks an encoder is fine-tuned on, without ReCoRD."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from pipeline_lib.evaluation import benchmark
from pipeline_lib.evaluation.benchmark import DataSet, FineTuning

if TYPE_CHECKING:
    from pipeline_lib.evaluation.finetuning import FineTuned

# In the order in which the published fields are the first two of each.
SETS = {
    "boolq": DataSet(("question", "passage")),
    "cb": DataSet(("premise", "hypothesis"), "macro_f1", 3),
    "copa": DataSet(("premise", "choice1", "choice2", "question")),
    "multirc": DataSet(("paragraph", "question", "answer"), "f1_a"),
    "rte": DataSet(("premise", "hypothesis")),
    "wic": DataSet(("word", "sentence1", "sentence2")),
    "wsc.fixed": DataSet(("text", "span1_text", "span2_text")),
}


class Settings(FineTuning):
    """10 epochs, 5e-5, the rest as for GLUE."""

    SETS: ClassVar = SETS

    type: Literal["superglue"] = "superglue"
    repo: str = Field("aps/super_glue", description="dataset repository: <data set>/<split>-*.parquet")
    epochs: int = Field(10, gt=0, description="passes over the training examples")
    lr: float = Field(5e-5, gt=0, description="peak learning rate; cosine decay to 0")


def needs(settings: Settings) -> list[dict[str, Any]]:
    """Its data sets on the hub."""
    return benchmark.needs(settings.repo, settings)


refuses = benchmark.refuses


def open_task(settings: Mapping[str, Any], inputs: Mapping[str, Path], scratch: Path) -> FineTuned:
    """The task with its examples read."""
    from pipeline_lib.evaluation.finetuning import FineTuned

    return FineTuned(Settings.model_validate(settings), inputs["asset-0"] / "files")
