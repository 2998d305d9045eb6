"""WordPiece tokenizers: the same in every process, ids of special tokens fixed, text normalised."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline_lib.data import tokenizer as tokenizers
from tests.data.jobs import digests, result, run
from tests.data.test_tokenizer import ROOT

TRAIN = """
import sys
from pathlib import Path
from tests.data.jobs import run
run("tokenizer", Path(sys.argv[1]), {"train": {"vocab_size": 400, "kind": "wordpiece"}}, dataset=Path(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def trained(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = {"train": {"vocab_size": 400, "kind": "wordpiece"}}
    return run("tokenizer", tmp_path_factory.mktemp("wordpiece"), settings, dataset=dataset)


def test_another_process_trains_the_same(dataset: Path, trained: Path, tmp_path: Path) -> None:
    """The published ids of special tokens come from a set, and the trainer's of pieces from a hash table."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "2"}
    subprocess.run([sys.executable, "-c", TRAIN, str(tmp_path), str(dataset)], check=True, env=env)
    assert digests(tmp_path / "work/out") == digests(trained)


def test_special_tokens_have_fixed_ids(trained: Path) -> None:
    from transformers import AutoTokenizer

    loaded: Any = AutoTokenizer.from_pretrained(trained)
    ids = [loaded.pad_token_id, loaded.unk_token_id, loaded.cls_token_id, loaded.sep_token_id, loaded.mask_token_id]
    assert ids == [0, 1, 2, 3, 4]
    info = result(trained / "info.json")
    assert info == {"vocab_size": 400, "bos": 2, "eos": 3, "pad": 0}, "documents are <cls> text <sep>"
    assert sorted(loaded.all_special_ids) == ids, "pieces are none"
    pair = loaded("one", "two", return_token_type_ids=True)
    assert [loaded.decode([t]) for t in (pair["input_ids"][0], pair["input_ids"][-1])] == ["<cls>", "<sep>"]
    assert pair["token_type_ids"][0] == 0
    assert pair["token_type_ids"][-1] == 1


def test_text_is_normalised(trained: Path) -> None:
    ours, _ = tokenizers.load(trained)

    def pieces(text: str) -> list[str]:
        return ours.encode(text, add_special_tokens=False).tokens

    assert pieces("Café ``x''  日本\x07y") == pieces('cafe "x" y')
    assert "<mask>" not in pieces("a <mask> b"), "in a text it is text"
    assert pieces("don't") == [*pieces("don"), "'", *pieces("t")]
    assert set(pieces("zqxj")) <= {"z", "##q", "##x", "##j", "##qx", "zq"}, "any ASCII word can be written"
