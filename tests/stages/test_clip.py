"""The stage `clip`: what it observes, what it leaves, and that a killed search goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pipeline_lib.artifacts.files import read_json
from pipeline_lib.artifacts.job import Job
from pipeline_lib.config.errors import UserError
from pipeline_lib.data.calibration import sequences
from pipeline_lib.models import bert, llama
from pipeline_lib.models.checkpoint import load_model, load_transform, save_checkpoint
from pipeline_lib.stages import clip, convert
from pipeline_lib.training.build import start_calibrated
from pipeline_lib.transforms.apply import apply
from pipeline_lib.transforms.int2 import clip as search_module
from pipeline_lib.transforms.int2.settings import Clip, Settings
from pipeline_lib.transforms.observe import calibrate, calibrated_functions, sampled_inputs
from pipeline_lib.transforms.packed import load_packed
from pipeline_lib.transforms.state import transform_state

WORDS = ["<s>", "</s>", *(f"w{i}" for i in range(62))]
SHAPE = {"dim": 32, "layers": 2, "heads": 2, "kv_heads": 1, "ffn": 48, "vocab": 64, "max_seq_len": 24}
SEARCHED = 2 * 5


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="</s>")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("inputs")
    torch.manual_seed(0)
    model = llama.build(SHAPE)
    folders = {name: root / name for name in ("init", "tokenizer", "text")}
    for folder in folders.values():
        folder.mkdir()
    save_checkpoint(folders["init"], model.config, model.state_dict(), tokenizer, "LlamaForCausalLM")
    tokenizer.save_pretrained(folders["tokenizer"])
    texts = [" ".join(f"w{(i * j) % 60}" for j in range(5 + i % 9)) for i in range(1, 60)]
    table = pa.table({"id": [str(i) for i in range(len(texts))], "text": texts, "answer": ["w7"] * len(texts)})
    pq.write_table(table, folders["text"] / "train-00000.parquet")
    return folders


def job(root: Path, inputs: dict[str, Path], **settings: Any) -> Job:
    out = root / "out"
    out.mkdir(parents=True, exist_ok=True)
    chosen = Settings(**{"group_size": 16, "clip": Clip(samples=40, tokens=50, grid=6), **settings})
    return Job("clip", "label", "0" * 64, {"transform": [chosen.semantic()]}, inputs, root / "work", out)


def test_it_leaves_ranges_and_a_report(tmp_path: Path, inputs: dict[str, Path]) -> None:
    made = job(tmp_path, inputs)
    clip.run(made)
    state = load_file(made.out / clip.STATE)
    report = read_json(made.out / clip.REPORT)["result"]
    assert len(report["layers"]) == SEARCHED
    assert len(state) == 2 * SEARCHED
    name = "model.layers.1.mlp.down_proj.transform.store"
    assert state[f"{name}.minimum"].shape == (32, 3)
    assert (state[f"{name}.minimum"] < state[f"{name}.maximum"]).all()
    for figures in [*report["layers"].values(), report["total"]]:
        assert 0 < figures["group_error_after"] <= figures["group_error_before"]
        assert 0 < figures["output_error_after"] < 1


def test_fewer_tokens_than_asked_for_are_all_used(tmp_path: Path, inputs: dict[str, Path]) -> None:
    made = job(tmp_path, inputs, clip=Clip(samples=2, grid=6))
    assert made.settings["transform"][0]["clip"]["tokens"] == 512
    clip.run(made)
    assert len(read_json(made.out / clip.REPORT)["result"]["layers"]) == SEARCHED


def test_a_killed_search_goes_on_to_the_same_bytes(
    tmp_path: Path, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layer by layer, and the model is not run over the text again; a damaged layer is searched again."""
    whole = job(tmp_path / "whole", inputs)
    clip.run(whole)
    part = job(tmp_path / "part", inputs)
    real, done = search_module.search, []

    def dies(*given: Any) -> Any:
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(1)
        return real(*given)

    monkeypatch.setattr("pipeline_lib.transforms.int2.store.search", dies)
    with pytest.raises(KeyboardInterrupt):
        clip.run(part)
    assert not (part.out / clip.STATE).exists()
    damaged = sorted((part.work / "layers").glob("*.safetensors"))[0]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    counted: list[int] = []
    monkeypatch.setattr("pipeline_lib.transforms.int2.store.search", lambda *g: counted.append(1) or real(*g))
    monkeypatch.setattr("pipeline_lib.transforms.observe.sampled_inputs", lambda *_: pytest.fail("observed again"))
    clip.run(part)
    assert len(counted) == SEARCHED - 4 + 1
    for name in (clip.STATE, clip.REPORT):
        assert (part.out / name).read_bytes() == (whole.out / name).read_bytes()


def test_layers_are_seen_as_the_exact_model_sees_them(inputs: dict[str, Path]) -> None:
    """One pass; every n-th token, counted through all sequences; no error of other layers in it."""
    model = load_model(inputs["init"])
    applied = apply(model, [{"type": "int2", "group_size": 16, "clip": {}}], seed=0)
    layers = {name: layer for name, (layer, _) in calibrated_functions(applied).items()}
    applied.remove()
    batches = [torch.arange(3 + n).view(1, -1) for n in range(6)]
    seen = sampled_inputs(model, layers, iter(batches), every=4)
    by_hand: dict[str, list[torch.Tensor]] = {name: [] for name in layers}

    def keep(name: str) -> Any:
        return lambda _, x: by_hand[name].append(x[0][0])

    handles = [layer.register_forward_pre_hook(keep(name)) for name, layer in layers.items()]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for handle in handles:
        handle.remove()
    for name, parts in by_hand.items():
        assert torch.allclose(seen[name], torch.cat(parts)[::4], atol=1e-6), name


def test_layers_of_an_encoder_are_searched_too(tmp_path: Path) -> None:
    """No list of one family's blocks: the same four kinds of layers of a BERT, its queries and keys left alone."""
    torch.manual_seed(0)
    model = bert.build({**SHAPE, "family": "bert", "max_seq_len": 16, "norm_eps": 1e-5})
    applied = apply(model, [{"type": "int2", "group_size": 16, "clip": {}}], seed=0)
    functions = calibrated_functions(applied)
    applied.remove()
    seen = sampled_inputs(model, {name: layer for name, (layer, _) in functions.items()}, [torch.arange(12)[None]], 1)
    state, figures = calibrate(applied, lambda: seen, tmp_path, torch.device("cpu"))
    kinds = ("attention.self.value", "attention.output.dense", "intermediate.dense", "output.dense")
    names = [f"bert.encoder.layer.{layer}.{kind}.transform.store" for layer in range(2) for kind in kinds]
    assert list(figures) == names
    assert set(state) == {f"{name}.{side}" for name in names for side in ("minimum", "maximum")}
    assert all(row["group_error_after"] < row["group_error_before"] for row in figures.values())


def test_an_uncalibrated_transform_is_refused(tmp_path: Path, inputs: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="no layer to act on"):
        clip.run(job(tmp_path, inputs, clip=Clip(skip=("*",))))


def test_weights_that_are_not_trained_become_a_packed_checkpoint(tmp_path: Path, inputs: dict[str, Path]) -> None:
    """init + clip → convert: latent weights with their ranges, and the packed form that says the same."""
    searched = job(tmp_path / "clip", inputs)
    clip.run(searched)
    out = tmp_path / "convert" / "out"
    out.mkdir(parents=True)
    settings = {"transform": searched.settings["transform"], "dtype": "float32", "layout": "hf"}
    given = {"init": inputs["init"], "clip": searched.out, "tokenizer": inputs["tokenizer"]}
    convert.run(Job("convert", "c", "1" * 64, settings, given, tmp_path / "convert", out))
    transform, added = load_transform(out)
    assert transform == settings["transform"]
    assert len(added) == 2 * 2 * 7, "layers that were not searched have their whole range"
    ranges = load_file(searched.out / clip.STATE)
    assert all(torch.equal(added[name], value) for name, value in ranges.items())
    assert torch.equal(load_model(out).lm_head.weight, load_model(inputs["init"]).lm_head.weight)
    sizes = read_json(out / "packed" / "sizes.json")["result"]
    assert sizes["layers"]["theoretical_bits_per_weight"] == 2 + 18 / 16
    assert sizes["not packed"]["bits_per_weight"] == 16, "embedding and output layer"
    assert 0 < sizes["largest_change_of_a_logit_by_16_bits"] < 0.1
    loaded, context = load_packed(out / "packed")
    context.context.begin(0, 0)
    assert torch.isfinite(loaded(torch.arange(8)[None]).logits).all()


def test_a_training_starts_from_clipped_weights(tmp_path: Path, inputs: dict[str, Path]) -> None:
    """The ranges are worked into the weights once, and bound the training no more."""
    searched = job(tmp_path, inputs)
    clip.run(searched)
    model, before = load_model(inputs["init"]), load_model(inputs["init"])
    applied = apply(model, searched.settings["transform"], seed=0)
    training = Job("train", "t", "2" * 64, {}, {"clip": searched.out}, tmp_path, tmp_path)
    start_calibrated(training, applied)
    ranges = load_file(searched.out / clip.STATE)
    changed = 0
    for name, parameter in model.named_parameters():
        layer = f"{name.removesuffix('.weight')}.transform.store"
        expected = before.get_parameter(name)
        if f"{layer}.minimum" in ranges:
            features = expected.shape[1]
            low, high = (
                ranges[f"{layer}.{side}"].repeat_interleave(16, 1)[:, :features] for side in ("minimum", "maximum")
            )
            changed += int((parameter != expected).sum())
            expected = expected.clamp(low, high)
        assert torch.equal(parameter, expected), name
    assert changed > 0
    assert all(torch.isinf(tensor).all() for tensor in transform_state(model).values())


# ---- text


def take(text: Path, tokenizer: Any, **given: Any) -> list[torch.Tensor]:
    return sequences(
        text, tokenizer, **{"samples": 40, "max_tokens": 512, "long": "cut", "length": 16, "seed": 42, **given}
    )


def test_sequences_are_seeded_and_whole(inputs: dict[str, Path], tokenizer: PreTrainedTokenizerFast) -> None:
    found = take(inputs["text"], tokenizer)
    assert {len(sequence) for sequence in found} == {16}
    assert torch.equal(torch.cat(found), torch.cat(take(inputs["text"], tokenizer)))
    assert not torch.equal(torch.cat(found), torch.cat(take(inputs["text"], tokenizer, seed=1)))
    more = take(inputs["text"], tokenizer, columns=["answer"])
    assert (torch.cat(more) == WORDS.index("w7")).sum() > (torch.cat(found) == WORDS.index("w7")).sum()


def test_long_texts_are_cut_or_left_out(inputs: dict[str, Path], tokenizer: PreTrainedTokenizerFast) -> None:
    cut = torch.cat(take(inputs["text"], tokenizer, max_tokens=7, length=1))
    skipped = torch.cat(take(inputs["text"], tokenizer, max_tokens=7, length=1, long="skip"))
    assert len(cut) > len(skipped) > 0
    with pytest.raises(UserError, match="no text to calibrate on is left"):
        take(inputs["text"], tokenizer, max_tokens=2, long="skip")


def test_few_tokens_make_one_short_sequence(inputs: dict[str, Path], tokenizer: PreTrainedTokenizerFast) -> None:
    [only] = take(inputs["text"], tokenizer, samples=1, length=1000)
    assert 2 <= len(only) < 1000


def test_a_teachers_records(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """The tokens that the teacher read and wrote, not what its text would be tokenised into now."""
    record = {"id": "a", "messages": [], "completion": "w7", "prompt_ids": [1, 2], "completion_ids": [3, 4]}
    (tmp_path / "records.jsonl").write_text(json.dumps(record) + "\n")
    [only] = take(tmp_path, tokenizer, length=1000)
    assert only.tolist() == [1, 2, 3, 4]


def test_no_text_at_all(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, inputs: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="no text to calibrate on"):
        take(tmp_path, tokenizer)
    with pytest.raises(UserError, match="no such column"):
        take(inputs["text"], tokenizer, columns=["question"])
