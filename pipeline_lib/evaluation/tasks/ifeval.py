"""Instruction following: lm-eval's own `ifeval` (Zhou et al., 2023), offline, in the model's chat template."""

from __future__ import annotations

import importlib
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import Field

from pipeline_lib.config.base import Settings as Base
from pipeline_lib.config.errors import UserError
from pipeline_lib.evaluation.greedy import Decoding
from pipeline_lib.evaluation.tasks import lm_eval

PROMPTS = {"repo": "google/IFEval", "repo_type": "dataset", "patterns": ["README.md", "*.jsonl"]}
PACKAGES = ("nltk", "langdetect", "immutabledict")


class Settings(Base):
    """All prompts of IFEval; strict and loose, for whole prompts and for single instructions."""

    type: Literal["ifeval"] = "ifeval"
    limit: int | float | None = Field(None, gt=0, description="prompts (≥ 1) or share of them (< 1); null = all")
    max_length: int | None = Field(None, ge=2, description="tokens of context; null = the model's")
    chat_template: bool = Field(True, description="put prompts into the tokenizer's chat template")
    system: str | None = Field(None, description="system prompt")
    decoding: Decoding = Field(
        Decoding.model_validate({"max_new_tokens": 1280}),
        description="how answers are generated: {max_new_tokens, prompt_lookup}",
    )
    punkt: str = Field(
        "https://raw.githubusercontent.com/nltk/nltk_data/gh-pages/packages/tokenizers/punkt_tab.zip",
        pattern=r"^https?://.*\.zip$",
        description="where the assets stage finds NLTK's sentence tokenizer, which three of the instructions need",
    )
    punkt_sha256: str = Field(
        "e57f64187974277726a3417ca6f181ec5403676c717672eef6a748a7b20e0106",
        pattern="^[0-9a-f]{64}$",
        description="its SHA-256; the download is refused if it has another",
    )


def needs(settings: Settings) -> list[dict[str, Any]]:
    """The prompts (asset-0) and NLTK's sentence tokenizer (asset-1)."""
    return [PROMPTS, {"url": settings.punkt, "sha256": settings.punkt_sha256, "name": "punkt_tab.zip"}]


def refuses(settings: Settings, model_family: str) -> str | None:
    """Why this task makes no sense for a family of models, or None."""
    return "it needs a causal language model, and an encoder is none" if model_family == "bert" else None


def open_task(settings: Mapping[str, Any], inputs: Mapping[str, Path], scratch: Path) -> lm_eval.LmEvalTask:
    """lm-eval's task with its data and its sentence tokenizer, without a network.

    Raises:
        UserError: a package or a part of the data is missing.
    """
    given = Settings.model_validate(settings)
    _assert_packages()
    install_punkt(inputs["asset-1"] / "files" / "punkt_tab.zip", scratch / "nltk_data")
    import langdetect  # type: ignore[import-not-found]

    langdetect.DetectorFactory.seed = 0  # it guesses languages by chance otherwise
    decoding = given.decoding
    generation = {**decoding.generation(), "max_gen_toks": decoding.max_new_tokens}
    task = lm_eval.Settings.model_validate(
        {
            "task": "ifeval",
            "hub": [PROMPTS],
            "generation": generation,
            **given.model_dump(include={"limit", "max_length", "chat_template", "system"}),
        }
    )
    return lm_eval.LmEvalTask(task, inputs, scratch)


def _assert_packages() -> None:
    for name in PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(
                f"ifeval needs the package {name}, which is not installed: {error}",
                where="tasks: ifeval",
                fix="make env (envs/pins.txt lists it)",
            ) from None


def install_punkt(archive: Path, folder: Path) -> None:
    """Unpack the English part of NLTK's `punkt_tab` (plain text, no pickle) and let nltk look there first.

    Raises:
        UserError: it is not in the archive.
    """
    import nltk

    target = folder / "tokenizers" / "punkt_tab" / "english"
    target.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(archive) as packed:
        members = [
            name for name in packed.namelist() if PurePosixPath(name).parent == PurePosixPath("punkt_tab/english")
        ]
        for name in members:
            if PurePosixPath(name).suffix in (".tab", ".txt"):
                with packed.open(name) as source, open(target / PurePosixPath(name).name, "wb") as file:
                    shutil.copyfileobj(source, file)
    if not (target / "collocations.tab").exists():
        raise UserError(
            "holds no punkt_tab/english: it is not NLTK's sentence tokenizer",
            where=str(archive),
            value=members[:5],
            fix="correct `punkt` and `punkt_sha256` of the task",
        )
    if str(folder) not in nltk.data.path:
        nltk.data.path.insert(0, str(folder))
