"""Tokenizers: trained the same every time, taken from the hub, and readable by transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline_lib.artifacts.files import read_json
from pipeline_lib.config.errors import UserError
from pipeline_lib.data import tokenizer as tokenizers
from tests.conftest import ROOT
from tests.data.jobs import digests, result, run
from tests.hub import FakeHub

TRAIN = """
import sys
from pathlib import Path
from tests.data.jobs import run
run("tokenizer", Path(sys.argv[1]), {"train": {"vocab_size": 400}}, dataset=Path(sys.argv[2]))
"""


@pytest.mark.parametrize("threads", ["1", "3"])
def test_training_depends_on_no_thread_count(dataset: Path, trained: Path, tmp_path: Path, threads: str) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "RAYON_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "true"}
    subprocess.run([sys.executable, "-c", TRAIN, str(tmp_path), str(dataset)], check=True, env=env)
    assert digests(tmp_path / "work/out") == digests(trained)


def test_transformers_reads_it(trained: Path) -> None:
    from transformers import AutoTokenizer

    loaded: Any = AutoTokenizer.from_pretrained(trained)
    info = result(trained / "info.json")
    assert info["vocab_size"] == 400 == len(loaded)
    assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == ("<|bos|>", "<|eos|>", "<|pad|>")
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (info["bos"], info["eos"], info["pad"])
    text = "  any bytes: \x00 é 日本 🎲\n\tdef f():\r\n"
    ids = loaded(text, add_special_tokens=False)["input_ids"]
    assert loaded.decode(ids) == text
    ours, _ = tokenizers.load(trained)
    assert ours.encode(text, add_special_tokens=False).ids == ids


def test_a_vocabulary_has_a_least_size(dataset: Path, tmp_path: Path) -> None:
    out = run("tokenizer", tmp_path, {"train": {"vocab_size": 259}}, dataset=dataset)
    assert result(out / "info.json")["vocab_size"] == 259
    with pytest.raises(UserError, match="≥ 259"):
        run("tokenizer", tmp_path, {"train": {"vocab_size": 258}}, dataset=dataset)


def from_hub(hub: FakeHub, root: Path, files: dict[str, bytes]) -> Path:
    hub.add("model", "o/tok", files)
    asset = {"kind": "hub", "repo": "o/tok", "repo_type": "model", "revision": "main", "patterns": ["*.json"]}
    out = run("assets", root / "asset", asset)
    return run("tokenizer", root / "tok", {"hub": {"repo": "o/tok", "revision": "main"}}, asset=out)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"bos_token": "<|bos|>", "eos_token": {"content": "<|eos|>"}}, ("<|bos|>", "<|eos|>", "<|eos|>")),
        ({"cls_token": "<|bos|>", "sep_token": "<|eos|>", "pad_token": "<|pad|>"}, ("<|bos|>", "<|eos|>", "<|pad|>")),
        ({"eos_token": "<|eos|>", "tokenizer_class": "GPT2Tokenizer"}, ("<|eos|>", "<|eos|>", "<|eos|>")),
    ],
)
def test_a_tokenizer_from_the_hub(
    hub: FakeHub, trained: Path, tmp_path: Path, config: dict[str, Any], expected: tuple[str, str, str]
) -> None:
    from transformers import AutoTokenizer

    files = {"tokenizer.json": (trained / "tokenizer.json").read_bytes()}
    out = from_hub(
        hub, tmp_path, {**files, "tokenizer_config.json": json.dumps({**config, "chat_template": "{}"}).encode()}
    )
    written = read_json(out / "tokenizer_config.json")
    assert tuple(written[f"{role}_token"] for role in ("bos", "eos", "pad")) == expected
    assert written["chat_template"] == "{}"
    loaded: Any = AutoTokenizer.from_pretrained(out)
    assert loaded("abc dé", add_special_tokens=False)["input_ids"] == tokenizers.load(trained)[0].encode("abc dé").ids


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"vocab.json": b"{}", "config.json": b"{}"}, r"models/o/tok: has no tokenizer.json"),
        ({"tokenizer.json": None, "tokenizer_config.json": b"{}"}, "declares neither eos_token nor sep_token"),
        ({"tokenizer.json": None, "tokenizer_config.json": b'{"eos_token": "</s>"}'}, "not in its vocabulary"),
    ],
)
def test_unusable_hub_tokenizers(
    hub: FakeHub, trained: Path, tmp_path: Path, files: dict[str, bytes | None], says: str
) -> None:
    known = (trained / "tokenizer.json").read_bytes()
    with pytest.raises(UserError, match=says):
        from_hub(hub, tmp_path, {name: known if data is None else data for name, data in files.items()})
