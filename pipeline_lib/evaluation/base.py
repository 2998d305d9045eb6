"""What a task type supplies, and what one run of it yields. Imports no torch.

A task type is a module in `pipeline_lib.evaluation.tasks` (or an entry point) with::

    class Settings(pipeline_lib.config.base.Settings)   # the entry under `tasks:` in config.yaml
    def needs(settings) -> list[dict]                    # what the assets stage must fetch: hub files, or a url
    def refuses(settings, model_family) -> str | None    # why it makes no sense for a family, told while planning
    def open_task(settings, inputs, scratch) -> Task     # data loaded, offline, ready to run on many models

A task whose runs leave records beside their metrics (texts, a line a layer) also has::

    READABLE = ("jsonl", "md")                           # endings of readable files: results/<experiment>/<task>.md
    def readable(settings, arms) -> dict[str, str]       # ending → text; arms: {arm: {run: [record, …]}}
    REFERENCE = True                                     # a transformed arm reads the clean one, its input `clean`
    TAKES_DATASET = True                                 # without a dataset of its own it takes the experiment's

`readable` is given the arms of a result, `clean` and `transformed`, or `clean` and the points of a sweep; the runs of
an arm are `clean`, or `seed-0`, `seed-1`, … for its fault seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pipeline_lib.transforms.context import FaultContext


def _made_anew(name: str, make: Callable[[], Any]) -> Any:
    return make()


@dataclass(frozen=True)
class Subject:
    """The model under evaluation.

    Attributes:
        model: in evaluation mode, on its device, already transformed.
        tokenizer: the checkpoint's own.
        context: says where in the fault streams a forward pass stands; None for a model without transforms.
        batch_size: sequences a forward pass; changes speed and rounding, never a fault.
        once: (name, make) → what `make` gives, plain JSON; kept, so that a run that is killed goes on behind it.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    context: FaultContext | None
    batch_size: int
    once: Callable[[str, Callable[[], Any]], Any] = _made_anew


@dataclass(frozen=True)
class Outcome:
    """One run of a task on one model.

    Attributes:
        metrics: by name; a broken model may well score infinity or NaN.
        sampling_stderr: the evaluator's own standard error over documents, where it gives one.
        n_samples: documents evaluated.
        conditions: what must be alike in runs that are compared: versions, few-shot, a digest of every request.
        record: the evaluator's own JSON, verbatim but for `host`; empty where it has none.
        host: its date, time and host fields.
        records: plain JSON objects for readable files, one line each.
        files: text files that go below the artifact's log/, by name: traces.
        repeats: of a metric that is a mean over the task's own seeds, its values; the arm's own, where it has one run.
    """

    metrics: dict[str, float]
    sampling_stderr: dict[str, float]
    n_samples: int
    conditions: dict[str, Any]
    record: dict[str, Any] = field(default_factory=dict)
    host: dict[str, Any] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    repeats: dict[str, list[float]] = field(default_factory=dict)


Arms = Mapping[str, Mapping[str, list[dict[str, Any]]]]
"""Records by arm and run."""


class Task(Protocol):
    """A task with its data loaded."""

    def run(self, subject: Subject, seed: int) -> Outcome:
        """Evaluate one model. `seed` moves everything random but faults: few-shot examples, sampling."""
        ...
