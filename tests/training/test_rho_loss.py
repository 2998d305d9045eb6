"""RHO-loss: what is noise, what is learnt, what is worth learning; masks, numbers and the account of work."""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from pipeline_lib.artifacts.files import read_json, write_json
from pipeline_lib.artifacts.job import Job
from pipeline_lib.config.errors import UserError
from pipeline_lib.config.load import load_config
from pipeline_lib.data.example_losses import ExampleLosses, sequence_count, sequences_digest
from pipeline_lib.data.tokens import TokenShards
from pipeline_lib.stages import score
from pipeline_lib.training.budget import rtx3090
from pipeline_lib.training.loop import Loop
from pipeline_lib.training.losses import IGNORED
from pipeline_lib.training.methods import rho_loss
from pipeline_lib.training.recipes import cram
from tests.training_bench import BATCH, MODELS, SEQ_LEN, VOCAB, Bench, Case, Sabotage, metrics, weights

MEGA = 3 * BATCH
RECIPE: Any = cram.Settings


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A BERT that has its irreducible losses from another BERT."""
    bench = Bench(Case("cram", "bert"), tmp_path_factory.mktemp("bert"))
    from pipeline_lib.models import bert

    torch.manual_seed(7)
    bert.build(MODELS["bert"]).save_pretrained(bench.root / "judge")
    bench.inputs["losses"] = scored(bench, bench.root / "judge", "losses", {"seed": 11, "rate": 0.15})
    return bench


def scored(bench: Bench, model: Path, name: str, masks: dict[str, Any] | None) -> Path:
    out = bench.root / name
    out.mkdir()
    settings = {"seq_len": SEQ_LEN, "masks": masks, "dtype": "float32"}
    inputs = {"tokens": bench.inputs["tokens"], "tokenizer": bench.inputs["tokenizer"], "model": model}
    score.run(Job("score", "label", "f", settings, inputs, bench.root / f"{name}-work", out))
    return out


def settings_of(**rho: Any) -> dict[str, Any]:
    return {"methods": [{"rho-loss": {"mega_batch": MEGA, **rho}}]}


def loop(bench: Bench, name: str, recipe: dict[str, Any], micro_batch: int = BATCH, **inputs: Path) -> Loop:
    work = bench.fresh(name, transform=[], recipe=recipe, micro_batch=micro_batch)
    job = Job.load(work / "job.json")
    return Loop(dataclasses.replace(job, inputs={**job.inputs, **inputs}))


def test_the_highest_scores_are_kept() -> None:
    nan, inf = float("nan"), float("inf")
    scores_N = torch.tensor([0.5, nan, 2.0, 0.5, -1.0, 2.0, -inf])
    assert rho_loss.highest(scores_N, 2).tolist() == [2, 5]
    assert rho_loss.highest(scores_N, 3).tolist() == [0, 2, 5], "of equal ones the first"
    assert rho_loss.highest(scores_N, 5).tolist() == [0, 2, 3, 4, 5]
    assert rho_loss.highest(scores_N, 7).tolist() == list(range(7)), "what is no number only when nothing else is left"


class Known:
    """A recipe whose losses are known: noise stays hard, what is learnt is easy, the rest is hard and need not be."""

    NOISE, LEARNT, USEFUL = range(3)
    encoder = False

    def __init__(self) -> None:
        self.settings = type("Recipe", (), {"global_batch": 4})
        self.kinds = torch.arange(300) % 3
        self.irreducible_N = torch.tensor([4.0, 0.1, 1.0])[self.kinds]
        self.read = 0

    def below(self, count: int) -> dict[str, torch.Tensor]:
        self.read += count
        sequence_N = torch.randperm(300, generator=torch.Generator().manual_seed(self.read))[:count]
        return {"sequence": sequence_N, "input_ids": sequence_N[:, None], "labels": sequence_N[:, None]}

    def losses(self, batch: dict[str, torch.Tensor], step: int) -> torch.Tensor:
        return torch.tensor([4.1, 0.15, 3.0])[self.kinds[batch["sequence"]]]


def test_what_can_still_be_learnt_is_chosen(tmp_path: Path) -> None:
    known = Known()
    job = Job("train", "x", "f", {"seed": 0}, {}, tmp_path, tmp_path)
    chooser: Any = rho_loss.method(rho_loss.Settings(mega_batch=20, masks="matched"), job)
    chooser.cram, chooser.losses_N, chooser.masks = known, known.irreducible_N, None
    batch = chooser.draw(0, 4, known.below)
    assert known.read == 20
    assert known.kinds[batch["sequence"]].tolist() == [Known.USEFUL] * 4
    assert chooser.draw(1, 8, known.below)["sequence"].shape == (8,)
    assert known.read == 60, "whoever asks for twice as many gets them out of twice as many"
    hardest = known.losses(candidates := known.below(20), 0).argsort(descending=True)[:4]
    assert (known.kinds[candidates["sequence"][hardest]] == Known.NOISE).all(), "the loss alone would choose noise"
    result = chooser.result()
    assert (result["seen"], result["chosen"]) == (60, 12)
    assert result["mean_score_chosen"] == pytest.approx(2.0)
    assert result["mean_score_seen"] < 1


def test_a_toy_whose_noise_is_known(tmp_path_factory: pytest.TempPathFactory) -> None:
    """From holdout to choice: every other sequence is noise, and the model trained on the holdout tells which."""
    bench = Bench(Case("cram", "llama"), tmp_path_factory.mktemp("toy"))
    toy_tokens(bench.inputs["tokens"])
    common = {"steps": 40, "lr": 1e-2, "warmup_steps": 4, "decay": "constant"}
    judge = loop(bench, "judge", {**common, "split": "holdout"})
    for _ in range(25):
        judge._optimizer_step()
    judge.model.save_pretrained(bench.root / "trained")
    bench.inputs["losses"] = scored(bench, bench.root / "trained", "losses", None)
    irreducible_N = ExampleLosses.load(bench.inputs["losses"]).loss_N
    assert irreducible_N[0::2].min() > 3.5, "noise"
    assert irreducible_N[1::2].max() < 2.5, "a pattern"

    made = loop(bench, "chooser", {**common, **settings_of()})
    hooks: Any = made.hooks
    drawn: list[int] = []
    draw = hooks.methods[0].draw

    def watched(step: int, count: int, below: Any) -> Any:
        batch = draw(step, count, below)
        drawn.extend(batch["sequence"].tolist())
        return batch

    hooks.methods[0].draw = watched
    for _ in range(7):
        made._optimizer_step()
    assert len(drawn) == 7 * BATCH
    assert np.mean(np.array(drawn) % 2) > 0.95, "patterns, not noise"
    rest = hooks.fresh(MEGA)
    losses_N = hooks.losses(rest, 7)
    hardest = rest["sequence"][losses_N.argsort(descending=True)[:BATCH]]
    assert (hardest % 2).float().mean() < 0.3, "by their loss alone it would train on noise"


def toy_tokens(folder: Path) -> None:
    """Sequences of noise and of a pattern in turn, in each split."""
    info = read_json(folder / "tokens.json")
    generator = np.random.default_rng(1)
    for split, sequences in (("train", 160), ("holdout", 160), ("valid", 10), ("test", 10)):
        rows = generator.integers(5, VOCAB, (sequences, SEQ_LEN))
        rows[1::2] = 5 + (np.arange(SEQ_LEN) + generator.integers(0, 8, (sequences // 2, 1))) % 8
        tokens = np.append(rows.flatten(), 5).astype(np.uint16)
        name = f"{split}-00000.safetensors"
        save_file({"tokens": tokens, "document_starts": np.zeros(1, np.int64)}, folder / name)
        info["result"]["shards"][split] = [{"file": name, "tokens": len(tokens)}]
    write_json(folder / "tokens.json", info)


def test_matched_masks_leave_no_noise_in_the_scores(encoder: Bench) -> None:
    """A model that is its own judge has nothing left to learn: all scores are 0, if both see the same masks."""
    found = {}
    for masks in ("matched", "fresh"):
        made = loop(encoder, masks, settings_of(masks=masks), init=encoder.root / "judge")
        hooks: Any = made.hooks
        text = hooks.fresh(MEGA)
        shown = hooks.methods[0]._shown(text)
        scores_N = hooks.losses(shown, 0) - hooks.methods[0].losses_N[text["sequence"]]
        scores_N = scores_N[~scores_N.isnan() & (shown["labels"] != IGNORED).any(dim=1)]
        assert len(scores_N) > MEGA / 2
        found[masks] = float(scores_N.abs().max())
        whole = torch.where(shown["labels"] != IGNORED, shown["labels"], shown["input_ids"])
        assert torch.equal(whole, torch.where(text["labels"] != IGNORED, text["labels"], text["input_ids"]))
        drawn = hooks.methods[0].draw(0, BATCH, lambda count, text=text: text)
        rows = [text["place"].tolist().index(place) for place in drawn["place"].tolist()]
        assert torch.equal(drawn["input_ids"], text["input_ids"][rows]), "what is trained on has masks of its own"
    assert found["matched"] < 1e-5
    assert found["fresh"] > 0.01, "as published: other masks than the irreducible losses'"


def test_a_losss_sequence_is_known_by_its_number(encoder: Bench) -> None:
    """Not by the order in which it is read, which is another for every seed."""
    made = loop(encoder, "numbers", settings_of())
    hooks: Any = made.hooks
    shards = TokenShards(encoder.inputs["tokens"], "train")
    text = hooks.fresh(MEGA)
    assert text["sequence"].tolist() != list(range(MEGA))
    whole_BT = torch.where(text["labels"] != IGNORED, text["labels"], text["input_ids"])
    for row, number in enumerate(text["sequence"].tolist()):
        assert whole_BT[row].tolist() == shards.read(number * SEQ_LEN, SEQ_LEN).tolist()


def test_looking_is_charged_or_free(encoder: Bench) -> None:
    for charged in (True, False):
        made = loop(encoder, f"charged-{charged}", {**settings_of(), "track_forward_pass_only": charged})
        hooks: Any = made.hooks
        for _ in range(2):
            made._optimizer_step()
        assert hooks.work.charged["train", 2] == 2 * BATCH
        assert (hooks.work.charged if charged else hooks.work.free)["forward", 2] == 2 * MEGA
        assert not (hooks.work.free if charged else hooks.work.charged)["forward", 2]
        assert hooks.place == 2 * MEGA, "what is not chosen is gone"
        result = hooks.result(made)
        assert result["methods"]["rho-loss"]["chosen"] == 2 * BATCH
        assert result["sequences_read"] == 2 * MEGA


@pytest.mark.parametrize(("mega_batch", "seconds"), [(3072, 4.932), (15_360, 13.85)])
def test_an_update_costs_what_it_did(mega_batch: int, seconds: float) -> None:
    """Reference seconds of the published sizes: 128 sequences look for .09285 s and train for .2253 s."""
    settings = RECIPE(steps=1, methods=[{"rho-loss": {"mega_batch": mega_batch}}])
    cost = rtx3090("forward", 16, mega_batch) + rtx3090("train", 16, settings.global_batch)
    assert cost == pytest.approx(seconds, abs=5e-3)
    assert settings.needed_tokens(None) == mega_batch * 128, "and reads as much"


def test_what_the_reference_cannot_price_is_refused_while_planning() -> None:
    model = load_config(Path(__file__).parents[2] / "config.yaml").models["bert"]
    for method, message in (
        ({"rho-loss": {"mega_batch": 3000}}, "mega_batch 3000 is no multiple"),
        ({"sophia-g": {"hessian_sequences": 100}}, "hessian_sequences 100 is no multiple"),
        ({"sophia-g": {"hessian_sequences": 100, "free_updates": True}}, None),
        ({"selective-backprop": {"candidates": 96}}, "candidates 96 is no multiple"),
        ({"layer-dropping": {"group": 64}}, "group 64 is no multiple"),
        ("sophia-g", None),
        ("selective-backprop", None),
        ("layer-dropping", None),
        ("rho-loss", None),
    ):
        settings = RECIPE(budget={"rst_hours": 6}, methods=[method])
        reason = cram.conflicts(settings, model)
        assert reason is None if message is None else message in str(reason)
    free = RECIPE(
        budget={"rst_hours": 6}, methods=[{"selective-backprop": {"candidates": 96}}], track_forward_pass_only=False
    )
    assert cram.conflicts(free, model) is None, "what costs nothing needs no price"


def test_curvature_costs_a_twentieth() -> None:
    settings = RECIPE(steps=1, methods=["sophia-g"])
    own: Any = settings.methods[0]
    train = own.hessian_every * rtx3090("train", 16, settings.global_batch)
    assert rtx3090("hessian", 16, own.hessian_sequences) / train == pytest.approx(0.05)


def test_kill_and_resume_and_ranks_choose_alike(encoder: Bench) -> None:
    """With faults, and with Sophia beside it: same bytes after a kill, the same choice on two ranks."""
    given = {
        "methods": [{"rho-loss": {"mega_batch": MEGA}}, {"sophia-g": {"hessian_sequences": BATCH, "hessian_every": 2}}]
    }
    whole, killed, both = (encoder.fresh(name, recipe=given) for name in ("whole", "killed", "both"))
    assert encoder.run(whole) == [0]
    batches = read_json(whole / "counts-0.json")["batch"]
    assert encoder.run(killed, Sabotage("kill", "batch", batches * 5 // 6)) == [-signal.SIGKILL]
    assert encoder.run(killed) == [0]
    encoder.same_result(killed, whole)
    assert read_json(killed / "counts-0.json")["batch"] < batches
    assert weights(killed) == weights(whole)
    assert encoder.run(both, world=2) == [0, 0]
    one, other = (read_json(work / "out" / "train.json")["result"]["methods"] for work in (whole, both))
    assert one["rho-loss"]["mean_score_chosen"] == pytest.approx(other["rho-loss"]["mean_score_chosen"], abs=2e-3)
    assert one["rho-loss"]["mean_score_chosen"] > one["rho-loss"]["mean_score_seen"]
    assert one["rho-loss"]["chosen"] == other["rho-loss"]["chosen"] == 6 * BATCH
    assert metrics(whole)[0]["loss"] == pytest.approx(metrics(both)[0]["loss"], rel=2e-4)


def test_losses_of_other_sequences_are_refused(encoder: Bench, tmp_path: Path) -> None:
    shards = TokenShards(encoder.inputs["tokens"], "train")
    count = sequence_count(shards, SEQ_LEN)
    digest = sequences_digest(shards, SEQ_LEN)
    unknown = {"seed": None, "rate": None}
    ExampleLosses(np.ones(count - 1, np.float32), SEQ_LEN, digest, unknown).save(tmp_path / "few")
    with pytest.raises(UserError, match="other sequences than those that are trained on"):
        loop(encoder, "few", settings_of(), losses=tmp_path / "few")
    ExampleLosses(np.ones(count, np.float32), SEQ_LEN, digest, unknown).save(tmp_path / "imported")
    with pytest.raises(UserError, match=r"nobody knows the masks(.|\n)*masks: fresh"):
        loop(encoder, "imported", settings_of(), losses=tmp_path / "imported")
    assert loop(encoder, "fine", settings_of(masks="fresh"), losses=tmp_path / "imported")
