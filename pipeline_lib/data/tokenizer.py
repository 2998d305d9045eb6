"""Tokenizers: byte-level BPE trained here, or taken from the hub; both end as the same two files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline_lib.artifacts.files import read_json, write_json
from pipeline_lib.artifacts.job import Job
from pipeline_lib.artifacts.progress import say
from pipeline_lib.config.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
SPECIAL: dict[str, Any] = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
WORDPIECE_TOKENS = ("<pad>", "<unk>", "<cls>", "<sep>", "<mask>")
"""Special tokens of a WordPiece tokenizer; their ids are their places here, whatever it is trained on."""
WORDPIECE_SPECIAL: dict[str, Any] = {
    "pad_token": "<pad>", "unk_token": "<unk>", "cls_token": "<cls>", "sep_token": "<sep>", "mask_token": "<mask>",
    "bos_token": "<cls>", "eos_token": "<sep>",
}  # fmt: skip
TRAINED_ON_BYTES = 256 * 2**20  # of text at most: a larger sample no longer changes common merges, but costs memory
ROLES = ("bos", "eos", "pad", "unk", "cls", "sep", "mask")


CHAT_TEMPLATE = "chat_template.jinja"


def build(job: Job) -> None:
    """Make the tokenizer artifact: tokenizer.json, tokenizer_config.json, info.json.

    Raises:
        UserError: the hub repository has no fast tokenizer, or nothing that ends a document.
    """
    if "train" in job.settings:
        given = job.settings["train"]
        make, special = (train, SPECIAL) if given.get("kind", "bpe") == "bpe" else (train_wordpiece, WORDPIECE_SPECIAL)
        tokenizer = make(job.inputs["dataset"], given["vocab_size"])
    else:
        origin = f"models/{job.settings['hub']['repo']}" if "hub" in job.settings else job.label
        tokenizer, special = from_files(job.inputs["asset"] / "files", origin)
    tokenizer.save(str(job.out / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **special}
    # Plain, as transformers wants it: not wrapped in result and provenance.
    write_json(job.out / "tokenizer_config.json", config)
    ids = {role: tokenizer.token_to_id(special[f"{role}_token"]) for role in ("bos", "eos", "pad")}
    write_json(job.out / "info.json", {"result": {"vocab_size": size(tokenizer), **ids}, "provenance": {}})


def size(tokenizer: Tokenizer) -> int:
    """Rows an embedding needs for it: the largest id and one more."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def train(dataset: Path, vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer with `vocab_size` entries, special tokens included, from the train split.

    The pieces that are merged within are those of GPT-2 (words with their leading space, numbers, signs);
    every byte has an entry, so any text can be written. The same documents give the same tokenizer.

    Raises:
        UserError: no room for the 256 bytes and the special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    least = len(alphabet) + len((BOS, EOS, PAD))
    if vocab_size < least:
        raise UserError(
            "too small a vocabulary", where="tokenizer", value=vocab_size, allowed=f"≥ {least}", fix="raise vocab_size"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[BOS, EOS, PAD], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_texts(dataset, TRAINED_ON_BYTES), trainer)
    if size(tokenizer) < vocab_size:
        say(f"tokenizer: the text gives only {size(tokenizer)} of {vocab_size} entries; the others stay unused")
    return tokenizer


def train_wordpiece(dataset: Path, vocab_size: int) -> Tokenizer:
    """A WordPiece tokenizer with `vocab_size` entries, special tokens included, from the train split.

    Text is normalised as by Geiping and Goldstein, 2022 (arXiv 2212.14034, section 4.1): TeX's quotes to plain ones, no
    accents, lower case, single spaces, printable ASCII alone; words and runs of punctuation are cut apart. A sentence
    becomes <cls> A <sep>, a pair <cls> A <sep> B <sep>; packed documents are <cls> text <sep>.
    """
    from tokenizers import trainers

    # The trainer numbers "##x" in the order of a hash table, which differs from run to run, and breaks ties by number:
    # so they are numbered here, and what it takes for special is made plain again.
    alphabet = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    inside = [f"##{character}" for character in alphabet]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=[*WORDPIECE_TOKENS, *inside],
        initial_alphabet=alphabet,
        continuing_subword_prefix="##",
        show_progress=False,
    )
    trained = _wordpiece({token: number for number, token in enumerate(WORDPIECE_TOKENS)})
    trained.train_from_iterator(_texts(dataset, TRAINED_ON_BYTES), trainer)
    tokenizer = _wordpiece(trained.get_vocab(with_added_tokens=True))
    if size(tokenizer) < vocab_size:
        say(f"tokenizer: the text gives only {size(tokenizer)} of {vocab_size} entries; the others stay unused")
    return tokenizer


def _wordpiece(vocab: dict[str, int]) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="<unk>", max_input_chars_per_word=100))
    tokenizer.add_special_tokens(list(WORDPIECE_TOKENS))
    tokenizer.normalizer = normalizers.Sequence([
        normalizers.Replace("``", '"'),
        normalizers.Replace("''", '"'),
        normalizers.NFD(),
        normalizers.Lowercase(),
        normalizers.StripAccents(),
        normalizers.Replace(Regex(r"[^\x20-\x7E\s]+"), ""),
        normalizers.Replace(Regex(" {2,}"), " "),
    ])  # fmt: skip
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<cls> $A <sep>",
        pair="<cls> $A <sep> $B:1 <sep>:1",
        special_tokens=[(token, WORDPIECE_TOKENS.index(token)) for token in ("<cls>", "<sep>")],
    )
    return tokenizer


def _texts(dataset: Path, limit: int) -> Iterator[str]:
    import pyarrow.parquet as pq

    taken = 0
    for path in sorted(dataset.glob("train-*.parquet")):
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                for text in file.read_row_group(group, columns=["text"])["text"].to_pylist():
                    yield text
                    taken += len(text.encode())
                    if taken >= limit:
                        return


def from_files(files: Path, origin: str) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer in a hub or local model's files, and the special tokens and limits it declares.

    A model without `bos` or `eos` but with `cls` and `sep` (BERT) uses those; without `pad`, `eos` pads.

    Raises:
        UserError: no tokenizer.json, or no token that could end a document.
    """
    from tokenizers import Tokenizer

    path = files / "tokenizer.json"
    if not path.exists():
        raise UserError(
            "has no tokenizer.json (a fast tokenizer)",
            where=origin,
            value=sorted(p.name for p in files.rglob("*") if p.is_file()),
            fix="choose a repository whose tokenizer is stored as tokenizer.json",
        )
    tokenizer = Tokenizer.from_file(str(path))
    declared = {**_json(files / "special_tokens_map.json"), **_json(files / "tokenizer_config.json")}
    kept = {key: declared[key] for key in ("model_max_length", "chat_template") if key in declared}
    if (files / CHAT_TEMPLATE).exists():  # where newer repositories keep it
        kept["chat_template"] = (files / CHAT_TEMPLATE).read_text(encoding="utf-8")
    tokens = {role: _content(declared.get(f"{role}_token")) for role in ROLES}
    tokens["bos"] = tokens["bos"] or tokens["cls"]
    tokens["eos"] = tokens["eos"] or tokens["sep"]
    tokens["pad"] = tokens["pad"] or tokens["eos"]
    if tokens["eos"] is None:
        raise UserError("declares neither eos_token nor sep_token", where=origin, fix="choose another tokenizer")
    for role, token in tokens.items():
        if token is not None and tokenizer.token_to_id(token) is None:
            raise UserError(f"its {role}_token is not in its vocabulary", where=origin, value=token)
    tokens["bos"] = tokens["bos"] or tokens["eos"]
    return tokenizer, {**kept, **{f"{role}_token": token for role, token in tokens.items() if token is not None}}


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _content(token: Any) -> str | None:
    """A special token as text; repositories write it as a string or as an object with `content`."""
    return token.get("content") if isinstance(token, dict) else token


def load(artifact: Path) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer of an artifact, and {vocab_size, bos, eos, pad} as ids.

    It reads the names of special tokens in a text as plain text: only packing sets document boundaries.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(artifact / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer, json.loads((artifact / "info.json").read_text())["result"]
