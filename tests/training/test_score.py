"""Stage `score`: each sequence's loss under a model, whatever the batch, and after a kill."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline_lib.artifacts.files import read_json
from pipeline_lib.artifacts.job import Job
from pipeline_lib.config.errors import UserError
from pipeline_lib.data.example_losses import ExampleLosses, check_same
from pipeline_lib.data.tokens import TokenShards
from pipeline_lib.models import bert, llama
from pipeline_lib.stages import score as stage
from pipeline_lib.training import score
from pipeline_lib.training.losses import IGNORED, cross_entropy_per_example
from pipeline_lib.training.masking import special_tokens
from tests.training_bench import MODELS, SEQ_LEN, VOCAB, make_tokens, make_with_transformers

COUNT = (1200 - 1) // SEQ_LEN


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens, a tokenizer, an encoder and a decoder."""
    folder = tmp_path_factory.mktemp("score")
    make_tokens(folder)
    make_with_transformers(folder)
    torch.manual_seed(0)
    shapes = {**MODELS, "crammed": {**MODELS["bert"], "crammed": True}}
    for name, family in (("bert", bert), ("crammed", bert), ("llama", llama)):
        model: Any = family.build(shapes[name])
        with torch.no_grad():  # untrained models find all text alike
            for parameter in model.parameters():
                parameter.mul_(5)
        model.save_pretrained(folder / name)
    return folder


def job(root: Path, out: Path, family: str, batch: int = 8, seed: int = 3, **more: Any) -> Job:
    (out / "out").mkdir(parents=True, exist_ok=True)
    masks = None if family == "llama" else {"seed": seed, "rate": 0.15}
    settings = {"seq_len": SEQ_LEN, "masks": masks, "dtype": "float32", **more}
    inputs = {"tokens": root / "tokens", "tokenizer": root / "tokenizer", "model": root / family}
    return Job("score", "label", "f", settings, inputs, out / "work", out / "out", {"eval_batch_size": batch})


def scored(made: Job) -> ExampleLosses:
    stage.run(made)
    return ExampleLosses.load(made.out)


def test_a_decoders_losses(root: Path, tmp_path: Path) -> None:
    """Against transformers' own loss of each sequence, which shifts the labels itself."""
    from transformers import LlamaForCausalLM

    found = scored(job(root, tmp_path, "llama", batch=5))
    shards = TokenShards(root / "tokens", "train")
    assert found.loss_N.shape == (COUNT,)
    check_same(found, shards, "here")
    model: Any = LlamaForCausalLM.from_pretrained(root / "llama")
    for number in (0, 41, COUNT - 1):
        window_1T = torch.from_numpy(shards.read(number * SEQ_LEN, SEQ_LEN + 1).astype(np.int64))[None]
        with torch.no_grad():
            assert found.loss_N[number] == pytest.approx(model(window_1T, labels=window_1T).loss.item(), rel=1e-5)
    assert found.loss_N.std() > 0.1
    result = read_json(tmp_path / "out" / "score.json")["result"]
    assert (result["sequences"], result["without_targets"], result["masks"]) == (COUNT, 0, None)


def test_an_encoders_losses(root: Path, tmp_path: Path) -> None:
    """A sequence's masks depend on its number and the seed alone; without targets there is no loss."""
    from transformers import BertForMaskedLM

    found = scored(job(root, tmp_path / "one", "bert", batch=7))
    other = scored(job(root, tmp_path / "two", "bert", batch=COUNT))
    assert np.allclose(found.loss_N, other.loss_N, rtol=1e-5, equal_nan=True)
    assert found.masks == {"seed": 3, "rate": 0.15}
    again = scored(job(root, tmp_path / "three", "bert", seed=4))
    assert not np.allclose(found.loss_N, again.loss_N, rtol=1e-2, equal_nan=True)

    token, special = special_tokens(job(root, tmp_path / "one", "bert"))
    masks = score.Masks(seed=3, rate=0.15, token=token, special=special, vocab=VOCAB)
    shards = TokenShards(root / "tokens", "train")
    model: Any = BertForMaskedLM.from_pretrained(root / "bert").eval()
    without = 0
    for number in range(COUNT):
        text_1T = torch.from_numpy(shards.read(number * SEQ_LEN, SEQ_LEN).astype(np.int64))[None]
        batch = masks.batch(text_1T, [number])
        if (batch["labels"] == IGNORED).all():
            without += 1
            assert np.isnan(found.loss_N[number])
            continue
        with torch.no_grad():
            expected = model(batch["input_ids"], labels=batch["labels"]).loss.item()  # its own mean over targets
        assert found.loss_N[number] == pytest.approx(expected, rel=1e-5)
    assert without > 0, "15 % of 16 tokens: some have none"
    assert read_json(tmp_path / "one" / "out" / "score.json")["result"]["without_targets"] == without


def test_a_model_that_decodes_its_targets_alone(root: Path, tmp_path: Path) -> None:
    """The crammed BERT: the same losses as from scores of all positions."""
    found = scored(job(root, tmp_path, "crammed"))
    scorer = score.Scorer(job(root, tmp_path, "crammed"), TokenShards(root / "tokens", "train"), SEQ_LEN)
    assert hasattr(scorer.model, "masked_logits")
    batch = scorer._batch(range(COUNT))
    with torch.no_grad():
        logits_BTV = scorer.model(input_ids=batch["input_ids"]).logits
    assert logits_BTV.shape == (COUNT, SEQ_LEN, VOCAB)
    expected_N = score.mean_losses(cross_entropy_per_example(logits_BTV, batch["labels"]), batch["labels"]).numpy()
    assert np.allclose(found.loss_N, expected_N, rtol=1e-5, equal_nan=True)


def test_a_killed_scoring_goes_on_with_the_same_bytes(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score, "PART", 20)
    whole, killed = job(root, tmp_path / "whole", "bert"), job(root, tmp_path / "killed", "bert")
    stage.run(whole)
    made: list[int] = []
    measure = score.Scorer.losses

    def until_killed(scorer: Any, first: int, *args: Any) -> Any:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(first)
        return measure(scorer, first, *args)

    monkeypatch.setattr(score.Scorer, "losses", until_killed)
    with pytest.raises(KeyboardInterrupt):
        stage.run(killed)
    assert made == [0, 20]
    made.clear()
    stage.run(killed)
    assert made == [40, 60], "what was there is used"
    for name in ("losses.safetensors", "score.json"):
        assert (killed.out / name).read_bytes() == (whole.out / name).read_bytes()


def test_imported_losses_are_checked_once_more(root: Path, tmp_path: Path) -> None:
    own = scored(job(root, tmp_path / "own", "bert"))
    replace(own, masks={"seed": None, "rate": None}).save(tmp_path / "asset" / "files")
    made = job(root, tmp_path / "imported", "bert")
    made = replace(made, inputs={"tokens": root / "tokens", "imported": tmp_path / "asset"})
    assert np.array_equal(scored(made).loss_N, own.loss_N, equal_nan=True)
    with pytest.raises(UserError, match="of another length"):
        stage.run(replace(made, settings={"seq_len": 8}))
    replace(own, digest="0" * 64).save(tmp_path / "asset" / "files")
    with pytest.raises(UserError, match="other sequences than those that are trained on"):
        stage.run(made)


def test_a_model_with_too_few_positions_is_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="longer than the model that scores them has positions"):
        stage.run(job(root, tmp_path, "llama", seq_len=SEQ_LEN + 1))
