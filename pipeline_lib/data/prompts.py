"""Prompts for a teacher: which documents of which datasets, in which form, in which mixture. Imports no torch."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from pipeline_lib.artifacts.progress import say
from pipeline_lib.config.base import Settings
from pipeline_lib.config.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CATEGORIES = {
    "S1": "Sexual",
    "S2": "Sexual/Minors",
    "S3": "Harassment",
    "S4": "Self-Harm",
    "S5": "Violence",
    "S6": "Hate",
    "S7": "Violence/Graphic",
    "S8": "Self-Harm/Intent",
    "S9": "Harassment/Threatening",
    "S10": "Self-Harm/Instructions",
    "S11": "Hate/Threatening",
}
"""What ToxicChat's moderation labels distinguish, in place of Llama Guard's own S1 … S13."""

# The prompt of Stanford Alpaca (Taori et al., 2023), with which WizardCoder and MetaMath were trained too.
ALPACA = (
    "Below is an instruction that describes a task{more}. "
    "Write a response that appropriately completes the request.\n\n"
)
ALPACA_INPUT = ", paired with an input that provides further context"


class Prompts(Settings):
    """Prompts from one dataset's train split."""

    dataset: str | None = Field(None, description="name of a dataset; default: the experiment's")
    template: Literal["prefix", "instruction", "code", "math", "guard"] = Field(
        "prefix",
        description="prefix: the beginning of a text, never in a chat template; instruction: text (and the column "
        "`input`) as a request; code, math: the same, in Alpaca's form where the tokenizer has no chat template; "
        "guard: text to be judged, in Llama Guard's template with the categories S1 to S11",
    )
    weight: float = Field(1.0, gt=0, description="share of the records, relative to the other entries")
    prefix_chars: int = Field(128, ge=1, description="prefix: characters of a text that are the prompt")
    min_chars: int = Field(512, ge=1, description="prefix: shorter texts are left out")
    stride: int | None = Field(
        None, ge=1, description="prefix: a prompt every so many characters of a text; null: one, at its beginning"
    )


class TeacherData(Settings):
    """What the teacher is asked, and how its answers are sampled."""

    prompts: tuple[Prompts, ...] = Field((), description="the mixture; default: prefixes of the experiment's dataset")
    n: int = Field(3000, ge=1, description="records")
    temperature: float = Field(0.7, gt=0, description="softmax temperature of sampling, from the whole vocabulary")
    max_new_tokens: int = Field(1024, ge=1, description="longest answer, tokens; fewer where the model's context ends")
    seed: int = Field(42, ge=0, description="seed of the choice of prompts and of every answer")
    deduplicate: bool = Field(True, description="no prompt text twice, over all datasets of the mixture")

    @property
    def entries(self) -> tuple[Prompts, ...]:
        """The mixture, the default one where none is given."""
        return self.prompts or (Prompts(),)  # type: ignore[call-arg]

    @model_validator(mode="after")
    def _enough(self) -> TeacherData:
        if self.n < len(self.prompts):
            raise ValueError(f"n {self.n} is less than the number of entries in prompts, {len(self.prompts)}")
        return self


@dataclass(frozen=True)
class Prompt:
    """What a teacher is asked.

    Attributes:
        id: unique; dataset, document and place in it.
        text: the user's message, or the text to go on from.
        template: see `Prompts`.
        dataset: its name.
        plain: the prompt where the tokenizer has no chat template; None: there must be one.
    """

    id: str
    text: str
    template: str
    dataset: str
    plain: str | None

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation so far, in the form that chat templates take."""
        content = [{"type": "text", "text": self.text}] if self.template == "guard" else self.text
        return [{"role": "user", "content": content}]


def render(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Token ids of a prompt: the model's chat template up to where the answer begins, or a plain text after `bos`.

    Raises:
        UserError: the template needs a chat template and the tokenizer has none.
    """
    if tokenizer.chat_template is not None and prompt.template != "prefix":
        return chat_ids(tokenizer, prompt.messages, CATEGORIES if prompt.template == "guard" else None)
    if prompt.plain is None:
        raise no_chat_template(tokenizer)
    bos: Any = tokenizer.bos_token_id
    first = [] if bos is None else [int(bos)]
    return first + list(tokenizer(prompt.plain, add_special_tokens=False)["input_ids"])  # type: ignore[call-overload]


def chat_ids(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], categories: dict[str, str] | None = None
) -> list[int]:
    """Token ids of a conversation with the generation prompt; special tokens come from the template alone, once."""
    extra: dict[str, Any] = {} if categories is None else {"categories": categories}
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **extra)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])  # type: ignore[call-overload]


def no_chat_template(tokenizer: PreTrainedTokenizerBase) -> UserError:
    """The error for Llama Guard's template with a model that has none."""
    return UserError(
        "the tokenizer has no chat template, and Llama Guard's question cannot be put without one",
        value=str(tokenizer.name_or_path).rsplit("/", 1)[-1],
        fix="use a Llama Guard model, or prompts of another template",
    )


def choose(data: TeacherData, artifacts: dict[str, Path]) -> list[Prompt]:
    """The prompts of a mixture, in an order that depends on the seed alone.

    Each entry gives its share of `n` (largest remainders); within it prompts are drawn without replacement: those
    whose hash with the seed is smallest, so that further documents move few. A dataset with too few is taken whole,
    and that is said.

    Args:
        data: with the name of a dataset in every entry.
        artifacts: name → artifact of the dataset stage.

    Raises:
        UserError: not one prompt.
    """
    seen: set[bytes] = set()
    chosen: list[tuple[bytes, Prompt]] = []
    for entry, quota in zip(data.prompts, quotas([entry.weight for entry in data.prompts], data.n), strict=True):
        assert entry.dataset is not None
        found = heapq.nsmallest(
            quota,
            (
                (_hash(data.seed, prompt.id), prompt.id, prompt)
                for prompt in _prompts(entry, artifacts[entry.dataset], data, seen)
            ),
        )
        if len(found) < quota:
            say(f"{entry.dataset} ({entry.template}) has {len(found)} different prompts, not {quota}: all are taken")
        chosen += [(mark, prompt) for mark, _, prompt in found]
        seen |= {_digest(prompt.text) for _, _, prompt in found}
    if not chosen:
        raise UserError(
            "no prompts: no text is long enough, or there is none",
            where="recipe.distill.data.prompts",
            value=[entry.semantic() for entry in data.prompts],
            fix="lower min_chars, or name another dataset",
        )
    return [prompt for _, prompt in sorted(chosen, key=lambda pair: (pair[0], pair[1].id))]


def quotas(weights: list[float], n: int) -> list[int]:
    """`n` divided in proportion to `weights`, by largest remainders."""
    exact = [n * weight / sum(weights) for weight in weights]
    whole = [int(share) for share in exact]
    order = sorted(range(len(exact)), key=lambda i: (whole[i] - exact[i], i))
    for index in order[: n - sum(whole)]:
        whole[index] += 1
    return whole


def _prompts(entry: Prompts, artifact: Path, data: TeacherData, seen: set[bytes]) -> Iterator[Prompt]:
    """The entry's candidates; without those that an earlier entry chose, and each text once, if so asked."""
    own: set[bytes] = set()
    for prompt in _candidates(entry, artifact):
        if data.deduplicate:
            mark = _digest(prompt.text)
            if mark in seen or mark in own:
                continue
            own.add(mark)
        yield prompt


def _candidates(entry: Prompts, artifact: Path) -> Iterator[Prompt]:
    import pyarrow.parquet as pq

    assert entry.dataset is not None
    for path in sorted(artifact.glob("train-*.parquet")):
        with pq.ParquetFile(path) as file:
            columns = ["id", "text", *(["input"] if "input" in file.schema_arrow.names else [])]
            for batch in file.iter_batches(1024, columns=columns):
                for row in batch.to_pylist():
                    yield from _of_document(entry, row)


def _of_document(entry: Prompts, row: dict[str, Any]) -> Iterator[Prompt]:
    text, name = str(row["text"]), f"{entry.dataset}:{row['id']}"
    assert entry.dataset is not None
    if entry.template == "prefix":
        starts = [0] if entry.stride is None else range(0, len(text), entry.stride)
        for start in starts:
            if len(text) - start > entry.min_chars:
                piece = text[start : start + entry.prefix_chars]
                if piece.strip():
                    yield Prompt(f"{name}:{start}", piece, "prefix", entry.dataset, piece)
        return
    if not text.strip():
        return
    context = str(row.get("input") or "")
    request = f"{text}\n{context}" if context else text
    plain = {"instruction": f"{request}\n", "guard": None}.get(entry.template, _alpaca(text, context, entry.template))
    yield Prompt(name, request, entry.template, entry.dataset, plain)


def _alpaca(instruction: str, context: str, template: str) -> str:
    head = ALPACA.format(more=ALPACA_INPUT if context else "") + f"### Instruction:\n{instruction}\n\n"
    middle = f"### Input:\n{context}\n\n" if context else ""
    return head + middle + "### Response:" + (" Let's think step by step." if template == "math" else "")


def _hash(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}:{name}".encode()).digest()[:16]


def _digest(text: str) -> bytes:
    return hashlib.sha256(" ".join(text.split()).encode("utf-8", "surrogatepass")).digest()[:16]
