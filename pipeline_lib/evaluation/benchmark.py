"""Benchmarks that fine-tune an encoder on several data sets: settings, the data sets, inputs and scores. No torch here.

The recipe is that of Cramming (Geiping and Goldstein, 2022, arXiv 2212.14034) as NoTrainNoGain uses it (Kaddour et al.,
2023, arXiv 2307.06440). Where its code does something else than it means to, that is a setting whose default is what is
meant; the value `published` is what was run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from pipeline_lib.config.base import Settings
from pipeline_lib.config.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

Metric = Literal["acc", "f1", "f1_a", "macro_f1", "mcc", "pearson"]
Share = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True)
class DataSet:
    """One data set of a benchmark.

    Attributes:
        fields: columns that are the input, in order.
        metric: which score of it enters the average.
        classes: 1 is a regression.
        validation: the split it is scored on.
        extra: a second such split, scored after the last epoch.
    """

    fields: tuple[str, ...]
    metric: Metric = "acc"
    classes: int = 2
    validation: str = "validation"
    extra: str | None = None

    @property
    def score(self) -> str:
        """The metric as it is written behind the data set's name: CommitmentBank's macro-averaged F1 is its f1."""
        return "f1" if self.metric == "macro_f1" else self.metric


class FineTuning(Settings):
    """Fine-tuning of a whole encoder with a new head, on every data set and seed."""

    SETS: ClassVar[Mapping[str, DataSet]] = {}

    revision: str = Field("main", min_length=1, description="branch, tag or commit; pinned by hub.lock.json")
    sets: tuple[str, ...] = Field((), description="data sets of the benchmark; the average is over these; empty: all")
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (0, 1, 2), min_length=1, description="seeds of the head, dropout and order; each fine-tunes every data set"
    )
    epochs: int = Field(5, gt=0, description="passes over the training examples")
    batch: int = Field(16, gt=0, description="examples an optimizer step; an incomplete last batch is dropped")
    lr: float = Field(4e-5, gt=0, description="peak learning rate; cosine decay to 0")
    betas: tuple[Share, Share] = Field((0.9, 0.98), description="decay of AdamW's two moments")
    eps: float = Field(1e-6, gt=0, description="AdamW's denominator offset")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay")
    warmup_fraction: Share = Field(0.1, description="warm-up as a share of the steps, rounded down")
    dropout: Share = Field(0.1, description="dropout probability of encoder and head")
    seq_len: int = Field(128, ge=8, description="tokens of an input; of longer ones the longest field is cut")
    head_width: int = Field(1024, gt=0, description="width of the head: Linear, Tanh, dropout, Linear")
    shuffle: bool = Field(True, description="another order of the examples in each epoch")
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="dtype of the matrix products (autocast; fp16 with loss scaling); weights are fp32"
    )
    limit: int | None = Field(None, ge=1, description="examples of each split, the first; null = all")
    warmup: Literal["own", "published"] = Field(
        "own", description="own: a share of the data set's own steps; published: the first data set's steps for all"
    )
    fields: Literal["all", "published"] = Field(
        "all", description="all: every field is read; published: the first two, others dropped"
    )
    first_token: Literal["cls", "published"] = Field(
        "cls", description="cls: every input begins with it; published: only pairs do, a single text begins with itself"
    )
    padding: Literal["masked", "published"] = Field(
        "masked", description="masked: attention leaves padding out; published: padding is attended to"
    )
    epoch: Literal["last", "published"] = Field(
        "last", description="last: scored after the last epoch; published: each score is its best over the epochs"
    )

    @model_validator(mode="after")
    def _known_sets(self) -> Self:
        wrong = [name for name in self.sets if name not in self.SETS]
        if wrong or len(set(self.sets)) < len(self.sets) or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"sets and seeds must be different ones, sets of {', '.join(self.SETS)}: {self.sets}")
        return self

    @property
    def chosen(self) -> dict[str, DataSet]:
        """The data sets that are fine-tuned on, in the benchmark's order."""
        return {name: found for name, found in self.SETS.items() if not self.sets or name in self.sets}


def needs(repo: str, settings: FineTuning) -> list[dict[str, Any]]:
    """The files of the chosen data sets, and of the first where its warm-up counts: one asset."""
    first = [next(iter(settings.SETS))] if settings.warmup == "published" else []
    names = dict.fromkeys([*first, *settings.chosen])
    patterns = [f"{name}/{split}*" for name in names for split in _splits(settings.SETS[name])]
    return [{"repo": repo, "revision": settings.revision, "patterns": patterns}]


def refuses(settings: FineTuning, model_family: str) -> str | None:
    """Why this task makes no sense for a family of models, or None."""
    return (
        None if model_family == "bert" else "it fine-tunes an encoder on its first token, and a decoder has read none"
    )


def _splits(data_set: DataSet) -> list[str]:
    return [f"{split}-" for split in ("train", data_set.validation, data_set.extra) if split]


# -- inputs ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Examples:
    """Inputs as tokens, and their labels (floats of a regression)."""

    ids: list[list[int]]
    labels: list[float]

    def digest(self) -> str:
        """SHA-256 of all."""
        return hashlib.sha256(json.dumps([self.ids, self.labels]).encode()).hexdigest()


Rows = list[tuple[tuple[str, ...], float]]
"""(texts of the fields, label) of every example."""


def read_rows(folder: Path, name: str, data_set: DataSet, split: str, limit: int | None = None) -> Rows:
    """The examples of `folder`/<name>/<split>-*.parquet.

    Raises:
        UserError: no such file, a column is missing, or a label is none of the classes.
    """
    import pyarrow.parquet as pq

    files = sorted((folder / name).glob(f"{split}-*.parquet"))
    where = f"{folder.name}: {name}/{split}-*.parquet"
    if not files:
        raise UserError("no such file", where=where, fix="give the `revision` of the repository that holds it")
    rows: Rows = []
    for path in files:
        there = pq.read_schema(path).names
        missing = [column for column in (*data_set.fields, "label") if column not in there]
        if missing:
            raise UserError("no such column", where=where, value=missing, allowed=there, fix="choose another revision")
        for row in pq.read_table(path, columns=[*data_set.fields, "label"]).to_pylist():
            rows.append((tuple(str(row[field]) for field in data_set.fields), float(row["label"])))
    rows = rows[:limit]
    wrong = [label for _, label in rows if data_set.classes > 1 and label not in range(data_set.classes)]
    if wrong or not rows:
        raise UserError(
            "labels are not those of the task", where=where, value=sorted(set(wrong)), fix="use its own data"
        )
    return rows


def encode_rows(rows: Rows, tokenizer: PreTrainedTokenizerBase, settings: FineTuning) -> Examples:
    """[CLS] first [SEP] second [SEP] …, cut to `seq_len`; a tokenizer without those uses its bos and eos.

    Raises:
        UserError: it has neither.
    """
    special: Any = tokenizer
    cls = special.bos_token_id if special.cls_token_id is None else special.cls_token_id
    sep = special.eos_token_id if special.sep_token_id is None else special.sep_token_id
    if cls is None or sep is None:
        raise UserError(
            "the tokenizer has no token that begins an input, or none that ends one",
            value={"begins": cls, "ends": sep},
            fix="use a tokenizer with [CLS] and [SEP], or with bos and eos",
        )
    kept = 2 if settings.fields == "published" else None
    columns = list(zip(*(texts[:kept] for texts, _ in rows), strict=True))
    tokens: Any = [tokenizer(list(column), add_special_tokens=False)["input_ids"] for column in columns]
    begins = [cls] if settings.first_token == "cls" or len(columns) > 1 else []
    ids = []
    for pieces in zip(*tokens, strict=True):
        cut = cut_longest(pieces, settings.seq_len - len(begins) - len(pieces))
        ids.append([*begins, *(token for piece in cut for token in [*piece, sep])])
    return Examples(ids, [label for _, label in rows])


def cut_longest(pieces: Sequence[list[int]], room: int) -> list[list[int]]:
    """The pieces without their ends so that they have at most `room` tokens together; always the longest is cut."""
    lengths = [len(piece) for piece in pieces]
    while sum(lengths) > room:
        at = max(range(len(lengths)), key=lengths.__getitem__)
        lengths[at] -= 1
    return [piece[:length] for piece, length in zip(pieces, lengths, strict=True)]


# -- scores ------------------------------------------------------------------------------------------------------------


def steps_of(examples: int, settings: FineTuning) -> int:
    """Optimizer steps of a data set: whole batches only, unless all of it is less than one."""
    return max(examples // settings.batch, 1) * settings.epochs


def warmup_of(own: int, first: int, settings: FineTuning) -> int:
    """Steps of warm-up of a data set with `own` steps where the benchmark's first one has `first`."""
    return int((first if settings.warmup == "published" else own) * settings.warmup_fraction)


def score(metric: Metric, output_NC: np.ndarray, labels: Sequence[float]) -> float:
    """A metric of a head's outputs: class scores, or one number of a regression.

    acc: share of right answers. f1: of class 1. f1_a: the same, over all answers of all questions (MultiRC).
    macro_f1: unweighted mean over classes. mcc: Matthews' correlation, 0 where one class alone is said. pearson:
    correlation of a regression, 0 where all outputs are alike. Outputs that are not finite score as class 0 would.
    """
    import warnings

    import numpy as np
    from scipy.stats import ConstantInputWarning, pearsonr
    from sklearn.metrics import f1_score, matthews_corrcoef

    output_NC = np.nan_to_num(output_NC, nan=0.0, posinf=0.0, neginf=0.0)
    if metric == "pearson":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConstantInputWarning)
            correlation: Any = pearsonr(output_NC[:, 0], np.asarray(labels))
        return float(correlation.statistic) if np.isfinite(correlation.statistic) else 0.0
    said_N, label_N = output_NC.argmax(axis=1), np.asarray(labels).astype(int)
    if metric == "acc":
        return float(np.mean(said_N == label_N))
    if metric == "mcc":
        return float(matthews_corrcoef(label_N, said_N))
    average: Any = "macro" if metric == "macro_f1" else "binary"
    return float(f1_score(label_N, said_N, average=average, zero_division=0.0))  # type: ignore[arg-type]
