"""How fast a model answers, and in how much memory; the one task whose figures no second run repeats exactly."""

from __future__ import annotations

import contextlib
import json
import statistics
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from pipeline_lib.artifacts.progress import Progress
from pipeline_lib.config.base import Settings as Base
from pipeline_lib.config.errors import UserError
from pipeline_lib.evaluation.base import Outcome, Subject
from pipeline_lib.evaluation.greedy import Decoded, Decoding, greedy

TRACE = "trace.json"
MIB = 2**20


class Settings(Base):
    """Greedy decoding of a fixed number of tokens after prompts of a fixed length, one prompt at a time."""

    type: Literal["speed"] = "speed"
    dataset: str = Field(description="dataset whose test split gives the prompts")
    prompt_tokens: int = Field(128, ge=1, description="tokens a prompt: texts are cut into pieces of so many")
    prompts: int = Field(20, ge=1, description="prompts that are timed")
    warmup: int = Field(3, ge=1, description="prompts decoded before, untimed")
    decoding: Decoding = Field(
        Decoding.model_validate({"max_new_tokens": 128}),
        description="{max_new_tokens, prompt_lookup}; with lookup each prompt is decoded with it and without",
    )
    profile: bool = Field(False, description="keep a torch.profiler trace of the last prompt in the artifact's log/")


def needs(settings: Settings) -> list[dict[str, Any]]:
    """Hub files beside the dataset: none."""
    return []


def refuses(settings: Settings, model_family: str) -> str | None:
    """Why this task makes no sense for a family of models, or None."""
    return "it needs a causal language model, and an encoder is none" if model_family == "bert" else None


def open_task(settings: Mapping[str, Any], inputs: Mapping[str, Path], scratch: Path) -> Speed:
    """The task with its texts loaded.

    Raises:
        UserError: the dataset has no test split.
    """
    return Speed(Settings.model_validate(settings), inputs["dataset"])


class Speed:
    """Decodes and takes the time."""

    def __init__(self, settings: Settings, dataset: Path) -> None:
        import pyarrow.parquet as pq

        self.settings, self._dataset = settings, dataset
        self._texts: list[str] = []
        for path in sorted(dataset.glob("test-*.parquet")):
            self._texts += pq.read_table(path, columns=["text"])["text"].to_pylist()
        if not self._texts:
            raise UserError("the dataset has no test split", where=str(dataset), fix="give its `split` a `test`")

    def run(self, subject: Subject, seed: int) -> Outcome:
        """Time one model; see `Task.run`."""
        settings = self.settings
        prompts = self._prompts(subject)
        plain = settings.decoding.model_copy(update={"prompt_lookup": 0})
        arms = {"": plain, **({"lookup_": settings.decoding} if settings.decoding.prompt_lookup else {})}
        found: dict[str, list[Decoded]] = {name: [] for name in arms}
        with Progress("speed", len(prompts) * len(arms), "prompts") as progress:
            for name, decoding in arms.items():
                for number, ids in enumerate(prompts):
                    decoded = greedy(subject, ids, decoding, number)
                    if number >= settings.warmup:
                        found[name].append(decoded)
                    progress.update()
        metrics, errors = figures(found)
        own = model_bytes(subject.model)
        metrics["model_mib"] = own / MIB
        for name, decoding in arms.items():  # untimed: on a CPU every allocation is recorded
            metrics[f"{name}peak_memory_mib"] = (own + _peak(subject, prompts[-1], decoding)) / MIB
        host, files = {}, {}
        if settings.profile:
            host["profile"], files[TRACE] = _profile(subject, prompts[-1], settings.decoding)
        return Outcome(
            metrics=metrics,
            sampling_stderr=errors,
            n_samples=len(prompts) - settings.warmup,
            conditions={"prompt_tokens": settings.prompt_tokens, "device": subject.model.device.type},
            host=host,
            files=files,
        )

    def _prompts(self, subject: Subject) -> list[list[int]]:
        """The warm-up prompts and the timed ones, all of one length.

        Raises:
            UserError: too few texts are long enough, or the context is too short.
        """
        settings, tokenizer = self.settings, subject.tokenizer
        span = int(subject.model.config.max_position_embeddings)
        if settings.prompt_tokens + settings.decoding.max_new_tokens > span:
            raise UserError(
                "prompt and answer do not fit into the model's context",
                where="tasks: speed",
                value=settings.prompt_tokens + settings.decoding.max_new_tokens,
                allowed=f"at most {span}",
                fix="lower prompt_tokens or decoding.max_new_tokens",
            )
        bos: Any = tokenizer.bos_token_id
        wanted, length = settings.prompts + settings.warmup, settings.prompt_tokens
        found: list[list[int]] = []
        for text in self._texts:
            ids: list[int] = list(tokenizer(text, add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]
            ids = ([] if bos is None else [bos]) + ids
            found += [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
            if len(found) >= wanted:
                return found[:wanted]
        raise UserError(
            f"the test split has only {len(found)} pieces of {length} tokens",
            where=str(self._dataset),
            value=wanted,
            fix="lower prompts, warmup or prompt_tokens",
        )


def figures(found: Mapping[str, list[Decoded]]) -> tuple[dict[str, float], dict[str, float]]:
    """({metric: value}, {metric: standard error over prompts}) from the decoded prompts, "" plain and "lookup_"."""
    metrics: dict[str, float] = {}
    errors: dict[str, float] = {}
    for prefix, runs in found.items():
        columns = {
            "prefill_s": [run.prefill_s for run in runs],
            "decode_s_per_token": [run.decode_s / max(len(run.ids) - 1, 1) for run in runs],
            "s_per_token": [(run.prefill_s + run.decode_s) / len(run.ids) for run in runs],
        }
        for name, values in columns.items():
            metrics[prefix + name] = statistics.fmean(values)
            if len(values) > 1:
                errors[prefix + name] = statistics.stdev(values) / len(values) ** 0.5
    if "lookup_" in found:
        plain, looked = found[""], found["lookup_"]
        tokens, passes = sum(len(run.ids) - 1 for run in looked), sum(run.passes for run in looked)
        metrics["lookup_acceptance_length"] = tokens / passes if passes else 1.0
        metrics["lookup_speed_up"] = sum(run.decode_s for run in plain) / sum(run.decode_s for run in looked)
        differ = [one.ids != other.ids for one, other in zip(plain, looked, strict=True)]
        metrics["lookup_divergence"] = statistics.fmean(differ)
    return metrics, errors


def model_bytes(model: Any) -> int:
    """Bytes of all parameters and buffers, each storage once: tied weights count once, packed codes as they are."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _peak(subject: Subject, prompt: list[int], decoding: Decoding) -> int:
    """The most bytes given out at a time, beside the model's own, while a prompt is decoded.

    What else lies on the device is not counted: an evaluation keeps the float weights that a packed model was made of.
    """
    from pipeline_lib.models.memory import allocated_peak

    return allocated_peak(lambda: greedy(subject, prompt, decoding, 0), subject.model.device)


def _profile(subject: Subject, prompt: list[int], decoding: Decoding) -> tuple[list[dict[str, Any]], str]:
    """(the 20 operators that take most time, the trace for chrome://tracing or Perfetto)."""
    from torch.profiler import profile

    with profile(record_shapes=True) as profiler:
        greedy(subject, prompt, decoding, 0)
    key = "self_device_time_total" if subject.model.device.type == "cuda" else "self_cpu_time_total"
    rows = sorted(profiler.key_averages(), key=lambda row: -getattr(row, key))[:20]
    table = [{"name": row.key, "calls": row.count, "self_us": getattr(row, key)} for row in rows]
    with _temporary() as path:
        profiler.export_chrome_trace(str(path))
        return table, json.dumps(json.loads(path.read_text()))


@contextlib.contextmanager
def _temporary() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="errata-trace-") as folder:
        yield Path(folder) / TRACE
