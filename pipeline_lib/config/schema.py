"""The shape of config.yaml. What a plug-in reads (a transform's p, a recipe's lr) is the plug-in's own."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field, model_validator

from pipeline_lib.config.base import Named, PluginSettings, Settings, added
from pipeline_lib.config.models import Bert, Llama, Mistral
from pipeline_lib.config.names import OWNED_REPOSITORY, REPOSITORY
from pipeline_lib.config.run import Run


class TrainedTokenizer(Settings):
    """A tokenizer trained on a dataset's train split."""

    dataset: str = Field(description="name of a dataset")
    vocab_size: int = Field(ge=259, le=2**20, description="entries of the vocabulary, special tokens included (≥ 259)")
    kind: Literal["bpe", "wordpiece"] = added(
        "bpe", "bpe: of bytes, any text can be written; wordpiece: lower-case ASCII, for encoders"
    )


class Tokenizer(Settings):
    """Trained here, or taken from the hub."""

    train: TrainedTokenizer | None = Field(default=None, description="train one: {dataset, vocab_size, kind}")
    hub: str | None = Field(default=None, pattern=REPOSITORY, description="hub repository: owner/name")
    revision: str = Field(default="main", description="branch, tag or commit on the hub")
    vocab: int | None = Field(
        default=None, ge=1, description="vocabulary size of the hub tokenizer (its embedding rows)"
    )

    @model_validator(mode="after")
    def _one_origin(self) -> Tokenizer:
        if (self.train is None) == (self.hub is None):
            raise ValueError("give exactly one of `train` and `hub`")
        if self.hub is not None and self.vocab is None:
            raise ValueError("a hub tokenizer needs `vocab`: planning counts parameters before anything is downloaded")
        return self

    @property
    def size(self) -> int:
        """Entries of the vocabulary."""
        return self.train.vocab_size if self.train else self.vocab or 0


class Split(Settings):
    """How documents are divided; by a hash of the document's id, so adding documents moves none."""

    valid: float | int = Field(default=0.01, ge=0, description="share (below 1) or number of validation documents")
    test: float | int = Field(default=0.01, ge=0, description="share (below 1) or number of test documents")
    holdout: float = added(
        0.0, "share of documents kept apart for a model whose losses choose what others learn", ge=0, lt=1
    )

    @model_validator(mode="after")
    def _leaves_some(self) -> Split:
        shares = sum(share for share in (self.valid, self.test, self.holdout) if share < 1)
        if shares >= 1:
            raise ValueError(f"valid, test and holdout leave nothing to train on: their shares make {shares:g}")
        return self


class Dataset(Settings):
    """Text with a pinned source and a fixed split."""

    source: PluginSettings = Field(description="{type: pydocs | local | url | hub, …}")
    split: Split = Field(default=Split(), description="{valid, test}")
    bytes_per_token: float | None = Field(
        default=None,
        gt=0,
        description="of a source larger than needed, fetch this many UTF-8 bytes for each token a training consumes",
    )
    seed: int = Field(default=0, ge=0, description="seed of the split")


class HubModel(Settings):
    """A checkpoint on the hub; safetensors only."""

    repo: str = Field(pattern=REPOSITORY, description="hub repository: owner/name")
    revision: str = Field(default="main", description="branch, tag or commit")
    family: Literal["llama", "mistral", "bert"] = Field(default="llama", description="its architecture family")
    parameters: int | None = Field(default=None, ge=1, description="parameters, for budgets that are a share of them")


class LocalModel(Settings):
    """A checkpoint in a folder of this machine, known by its content; safetensors only."""

    path: str = Field(description="folder of a Hugging Face checkpoint, relative to config.yaml")
    family: Literal["llama", "mistral", "bert"] = Field(default="llama", description="its architecture family")
    parameters: int | None = Field(default=None, ge=1, description="parameters, for budgets that are a share of them")


class Model(Settings):
    """An architecture at a size, or a checkpoint that is there already, with the defaults of experiments on it."""

    llama: Llama | None = Field(default=None, description="a llama of these dimensions")
    mistral: Mistral | None = Field(default=None, description="a mistral of these dimensions")
    bert: Bert | None = Field(default=None, description="a BERT of these dimensions")
    hub: HubModel | None = Field(default=None, description="a hub checkpoint: {repo, revision}")
    local: LocalModel | None = Field(default=None, description="a checkpoint on this machine: {path}")
    tokenizer: str | None = Field(default=None, description="name of a tokenizer (a checkpoint brings its own)")
    dataset: str | None = Field(default=None, description="name of the dataset it is trained on by default")
    recipe: Named | None = Field(default=None, description="a recipe's name, or {name: {setting: value}}")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(default="float32", description="dtype of evaluation")
    tasks: list[str] = Field(default=[], description="tasks that the target `all` evaluates")
    run: Run = Field(default=Run(), description="how it runs, see `run`")

    @model_validator(mode="after")
    def _one_kind(self) -> Model:
        given = [name for name in ("llama", "mistral", "bert", "hub", "local") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError("give exactly one of `llama`, `mistral`, `bert`, `hub` and `local`")
        if self.trained is None and self.tokenizer is None:
            raise ValueError("a model that is built from dimensions needs a `tokenizer`")
        return self

    @property
    def trained(self) -> HubModel | LocalModel | None:
        """The checkpoint that the model is; None where it is built from dimensions."""
        return self.hub or self.local


class ImportedLosses(Settings):
    """What `python -m pipeline_lib import-losses` wrote."""

    folder: str = Field(description="folder on this machine")


class Experiment(Settings):
    """model × transform × recipe × dataset."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    model: str | None = Field(default=None, description="name of a model; taken from `from` when that is given")
    transform: Named | None = Field(
        default=None, description="a transform's name, a composition a+b, or {name: {setting: value}} in order"
    )
    recipe: Named | None = Field(default=None, description="a recipe's name, or {name: {setting: value}}")
    dataset: str | None = Field(default=None, description="name of a dataset; default: the model's")
    from_: str | None = Field(
        default=None, alias="from", description="experiment whose checkpoint this one starts from"
    )
    teacher: str | None = Field(default=None, description="experiment or hub model whose outputs this one learns")
    losses: str | ImportedLosses | None = Field(
        default=None,
        description="experiment whose model gives the loss of each training sequence, or {folder} of imported ones",
    )
    seed: int = Field(
        default=0, ge=0, le=2**31 - 1, description="seed of initialisation, data order and training faults"
    )
    tasks: list[str] | None = Field(
        default=None, description="tasks that the target `all` evaluates; default: the model's"
    )
    publish: str | None = Field(
        default=None,
        pattern=OWNED_REPOSITORY,
        description="hub repository to publish to: owner/name (only by the target results/publish/…)",
    )
    run: Run = Field(default=Run(), description="how it runs, see `run`")


class Sweep(Settings):
    """A grid over settings of an experiment, collected into one CSV."""

    experiment: str = Field(description="name of the experiment that is varied")
    task: str = Field(description="name of a task")
    grid: dict[str, list[Any] | dict[str, Any]] = Field(
        min_length=1,
        description="{axis: [values]}, or {axis: {name of a value: value}}; an axis is a dotted setting, e.g. "
        "transform.bitflip.weight.p_frac, or a name that `settings` uses",
    )
    settings: dict[str, Any] = Field(
        default={},
        description="{dotted setting: value} of each point, in which {axis} stands for the axis' value, e.g. "
        'transform.bitflip.{operand}.p_frac: "{p_frac}"',
    )
    metric: str | None = Field(
        default=None, description="the task's metric that its pictures show; null: word_perplexity and its like first"
    )
    on_request: bool = Field(
        default=False, description="made only when it is asked for: no part of the target `all` and of the report"
    )


class Table(Settings):
    """Experiments arranged in rows and columns."""

    task: str = Field(description="name of a task")
    metric: str = Field(description="the task's metric, e.g. word_perplexity")
    rows: list[str] = Field(min_length=1, description="headings of the rows")
    columns: list[str] = Field(min_length=1, description="headings of the columns")
    cells: list[list[str]] = Field(description="experiments, one list a row")

    @model_validator(mode="after")
    def _rectangular(self) -> Table:
        if len(self.cells) != len(self.rows) or any(len(row) != len(self.columns) for row in self.cells):
            raise ValueError(f"cells must be {len(self.rows)} lists of {len(self.columns)} experiments")
        return self


class Measure(Settings):
    """A metric that arms are compared by."""

    task: str = Field(description="name of a task")
    metric: str = Field(description="a metric of the task, which says whether more of it is better")
    delta: float = Field(gt=0, description="δ: the smallest difference that matters")


class Comparison(Settings):
    """Arms against a baseline, in several columns and with several seeds: results/tables/<name>.csv, .md, .svg."""

    experiment: str = Field(description="name of the experiment that every cell is")
    arms: dict[str, dict[str, Any]] = Field(
        min_length=2,
        description="{arm: what it changes of the experiment}; the first is the baseline; in `losses` and other text "
        "{dataset} stands for the dataset of the column",
    )
    columns: dict[str, dict[str, Any]] = Field(
        min_length=1, description="{column: what all its arms change of the experiment}: budgets, datasets"
    )
    seeds: list[int] = Field(min_length=2, description="training seeds; arms are compared seed by seed")
    measures: list[Measure] = Field(min_length=1, description="{task, metric, delta} of each comparison")
    level: float = Field(0.05, gt=0, lt=0.5, description="of the tests; intervals are of 1 − level")
    on_request: bool = Field(
        default=False, description="made only when it is asked for: no part of the target `all` and of the report"
    )

    @model_validator(mode="after")
    def _distinct(self) -> Comparison:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be different ones: {self.seeds}")
        return self


class Tracking(Settings):
    """Where metrics go beside the JSONL that is always written."""

    wandb: Literal["off", "offline", "online"] = Field(
        default="offline", description="off, offline (sync later) or online"
    )
    project: str = Field(default="errata", description="wandb project")


class Cluster(Settings):
    """What is done where when jobs are submitted."""

    network_stages: Literal["here", "jobs"] = Field(
        default="here",
        description="here: assets, dataset and publish run beside snakemake, on the login node; "
        "jobs: they are submitted, for clusters whose nodes reach the internet",
    )


class Report(Settings):
    """The HTML report."""

    title: str = Field(default="Errata", description="heading")


class Config(Settings):
    """The whole of config.yaml."""

    tokenizers: dict[str, Tokenizer] = Field(default={}, description="tokenizers by name")
    datasets: dict[str, Dataset] = Field(default={}, description="datasets by name")
    models: dict[str, Model] = Field(default={}, description="models by name")
    transforms: dict[str, PluginSettings] = Field(
        default={}, description="transforms by name, with their default settings"
    )
    recipes: dict[str, PluginSettings] = Field(
        default={}, description="recipes by name, with settings other than the defaults"
    )
    tasks: dict[str, PluginSettings] = Field(default={}, description="tasks by name: {type, …}")
    experiments: dict[str, Experiment | None] = Field(default={}, description="experiments by name")
    sweeps: dict[str, Sweep] = Field(default={}, description="sweeps by name")
    tables: dict[str, Table] = Field(default={}, description="tables by name")
    comparisons: dict[str, Comparison] = Field(
        default={}, description="comparisons by name; each makes results/tables/<name>.csv, .md and .svg"
    )
    fault_seeds: int = Field(
        5, ge=1, le=1000, description="fault seeds an evaluation with random faults is repeated for"
    )
    run: Run = Field(default=Run(), description="defaults of how stages run")
    tracking: Tracking = Field(default=Tracking(), description="wandb")
    cluster: Cluster = Field(default=Cluster(), description="where stages run when jobs are submitted")
    report: Report = Field(default=Report(), description="the HTML report")


if __name__ == "__main__":
    import json

    print(json.dumps(Config.model_json_schema(), indent=1, sort_keys=True))
