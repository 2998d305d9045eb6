"""Texts that a model writes on given prompts, side by side under every setting."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from pipeline_lib.config.base import Settings as Base
from pipeline_lib.config.errors import UserError
from pipeline_lib.evaluation.base import Arms, Outcome, Subject
from pipeline_lib.evaluation.records import read_records
from pipeline_lib.evaluation.texts import BETTER, as_jsonl, as_markdown, compare, text_metrics

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

READABLE = ("jsonl", "md")
REFERENCE = True
MOST_PROMPT_BYTES = 2**20


class Settings(Base):
    """Prompts, and how they are continued; the sampling options are those of transformers."""

    type: Literal["generate"] = "generate"
    prompts: list[str] | None = Field(None, min_length=1, description="prompts, written out")
    file: str | None = Field(
        None, description="file of prompts: .txt, one a line, or .jsonl with `prompt` or `text`; read while planning"
    )
    dataset: str | None = Field(None, description="one of our datasets, whose documents' beginnings are prompts")
    split: Literal["train", "valid", "test"] = Field("test", description="split of the dataset")
    documents: int = Field(8, ge=1, description="documents of the dataset, from the first on")
    prompt_tokens: int = Field(
        16,
        ge=1,
        description="tokens at the beginning of a document that are its prompt",
    )
    chat_template: bool = Field(
        False, description="put each prompt as the user's turn into the tokenizer's chat template"
    )
    system: str | None = Field(None, description="system prompt of the chat")
    do_sample: bool = Field(True, description="sample; false: the most likely token (the four below then say nothing)")
    temperature: float = Field(0.6, gt=0, description="divides the logits")
    top_k: int | None = Field(50, ge=1, description="sample among the k most likely tokens; null = all")
    top_p: float = Field(
        0.9, gt=0, le=1, description="sample among the most likely tokens whose probabilities reach this sum"
    )
    seed: int = Field(0, ge=0, description="seed of sampling; each prompt draws from a stream of its own")
    max_new_tokens: int = Field(100, ge=1, description="tokens of a continuation at most")

    @model_validator(mode="before")
    @classmethod
    def _read_file(cls, values: Any) -> Any:
        """The file's prompts in place of its name: what they say enters the fingerprint, and stages need no file."""
        if not isinstance(values, Mapping) or values.get("file") is None:
            return values
        if values.get("prompts") is not None:
            raise ValueError("give either `prompts` or `file`")
        return {**values, "file": None, "prompts": read_prompts(Path(str(values["file"])))}

    @model_validator(mode="after")
    def _one_origin(self) -> Settings:
        if (self.prompts is None) == (self.dataset is None):
            raise ValueError("give exactly one of `prompts`, `file` and `dataset`")
        if self.system is not None and not self.chat_template:
            raise ValueError("`system` needs `chat_template: true`")
        return self


def read_prompts(path: Path) -> list[str]:
    """The prompts in a .txt file (its lines that are not empty) or a .jsonl file (`prompt`, else `text`, of each line).

    Raises:
        ValueError: no such file, another ending, a line without a prompt, no prompt at all, or more than 1 MiB.
    """
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"prompts are read from .txt and .jsonl files, not from {path}")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read prompts from {path}: {error}") from None
    if len(text.encode()) > MOST_PROMPT_BYTES:
        raise ValueError(f"{path} has more than 1 MiB of prompts: make it a dataset (source `local`)")
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines:
        raise ValueError(f"{path} holds no prompt")
    if path.suffix == ".txt":
        return [line.removesuffix("\r") for line in lines]
    return [_prompt_of(line, f"{path}, prompt {number}") for number, line in enumerate(lines, 1)]


def _prompt_of(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except ValueError:
        raise ValueError(f"{where}: not JSON") from None
    found = value.get("prompt", value.get("text")) if isinstance(value, dict) else None
    if not isinstance(found, str):
        raise ValueError(f"{where}: needs a string `prompt` or `text`")
    return found


def needs(settings: Settings) -> list[dict[str, Any]]:
    """No hub files."""
    return []


def refuses(settings: Settings, model_family: str) -> str | None:
    """Why this task makes no sense for a family of models, or None."""
    return "it needs a causal language model, and an encoder is none" if model_family == "bert" else None


def open_task(settings: Mapping[str, Any], inputs: Mapping[str, Path], scratch: Path) -> GenerateTask:
    """The task with its prompts and, for a transformed arm, the clean arm's texts.

    Args:
        settings: as they stand in a spec.
        inputs: `dataset` if the settings name one; `clean`, the evaluate artifact of the clean arm, or absent.
        scratch: not used.
    """
    checked = Settings.model_validate(settings)
    clean = read_records(inputs["clean"])["clean"] if "clean" in inputs else None
    documents = _documents(checked, inputs["dataset"]) if checked.dataset else None
    return GenerateTask(checked, documents, clean)


def _documents(settings: Settings, dataset: Path) -> list[str]:
    import pyarrow.parquet as pq

    found: list[str] = []
    for path in sorted(dataset.glob(f"{settings.split}-*.parquet")):
        found += pq.read_table(path, columns=["text"]).column("text").to_pylist()[: settings.documents - len(found)]
    if len(found) < settings.documents:
        raise UserError(
            "the dataset has too few documents for prompts",
            where=f"{dataset}: split {settings.split}",
            value=len(found),
            allowed=f"{settings.documents} or more",
            fix="lower `documents` of the task, or choose another `split`",
        )
    return found


class GenerateTask:
    """Prompts, ready to be continued by many models."""

    def __init__(self, settings: Settings, documents: list[str] | None, clean: list[dict[str, Any]] | None) -> None:
        self.settings, self._documents, self._clean = settings, documents, clean

    def run(self, subject: Subject, seed: int) -> Outcome:
        """Continue every prompt; see `Task.run`."""
        from pipeline_lib.evaluation.decoding import Sampling, decode

        settings = self.settings
        prompts = self._encode(subject.tokenizer)
        sampling = None
        if settings.do_sample:
            sampling = Sampling(settings.temperature, settings.top_k, settings.top_p, (seed, settings.seed))
        found = decode(subject, prompts, settings.max_new_tokens, sampling)
        records: list[dict[str, Any]] = []
        for index, (prompt, continuation) in enumerate(zip(prompts, found, strict=True)):
            records.append(
                {
                    "prompt": index,
                    "before": subject.tokenizer.decode(prompt),
                    "text": subject.tokenizer.decode(continuation.tokens, skip_special_tokens=True),
                    "tokens": continuation.tokens,
                    "finished": continuation.finished,
                    "not_finite": continuation.not_finite,
                }
            )
        compare(records, records if self._clean is None else self._clean)
        digest = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
        return Outcome(
            metrics=text_metrics(records),
            sampling_stderr={},
            n_samples=len(records),
            conditions={"prompts": digest, "higher_is_better": {"generate": BETTER}},
            records=records,
        )

    def _encode(self, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        """Token ids of every prompt."""
        settings = self.settings
        texts = settings.prompts if self._documents is None else self._documents
        assert texts is not None
        if settings.chat_template and not tokenizer.chat_template:
            raise UserError(
                "the tokenizer has no chat template",
                where="task generate: chat_template",
                value=True,
                fix="set `chat_template: false`, or choose an instruction-tuned model",
            )
        if settings.chat_template:
            system = [{"role": "system", "content": settings.system}] if settings.system is not None else []
            if self._documents is not None:  # cut before the template, which must stay whole
                cut = [tokenizer(text, add_special_tokens=False).input_ids[: settings.prompt_tokens] for text in texts]
                texts = [tokenizer.decode(ids) for ids in cut]
            turns: list[Any] = [[*system, {"role": "user", "content": text}] for text in texts]
            chats: list[Any] = [
                tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False) for turn in turns
            ]
            found = [tokenizer(chat, add_special_tokens=False).input_ids for chat in chats]
        else:
            found = [tokenizer(text).input_ids for text in texts]
            if self._documents is not None:
                found = [ids[: settings.prompt_tokens] for ids in found]
        for index, ids in enumerate(found):
            if not ids:
                raise UserError(
                    "a prompt has no tokens", where=f"task generate: prompt {index}", value=texts[index], fix="fill it"
                )
        return found


def readable(settings: Settings, arms: Arms) -> dict[str, str]:
    """Every text as a line of JSON, and a table a prompt in Markdown."""
    return {"jsonl": as_jsonl(arms), "md": as_markdown(arms, settings.semantic())}
