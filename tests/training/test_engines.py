"""The engines compute what they say: against plain PyTorch, against each other, however the batch is shared."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from pipeline_lib.artifacts.files import read_json, write_json
from pipeline_lib.artifacts.job import Job
from tests.training_bench import BATCH, SEQ_LEN, STEPS, Bench, Case, ended, fork, metrics, weights

SAME: dict[str, Any] = {"betas": [0.9, 0.98], "eps": 1e-6, "weight_decay": 0.1, "max_norm": 0.5, "lr": 3e-3}


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(Case("finetune", "llama"), tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def loop(trainer: Bench, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    bench = Bench(Case("cram", "llama"), tmp_path_factory.mktemp("loop"))
    bench.inputs = trainer.inputs
    return bench


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(Case("cram", "bert"), tmp_path_factory.mktemp("bert"))


def trained(bench: Bench, name: str, **given: Any) -> Path:
    work = bench.fresh(name, **given)
    assert bench.run(work, world=given.get("processes", 1)) == [0] * given.get("processes", 1)
    return work


def close(one: Path, other: Path, tolerance: float) -> None:
    """No weight differs by `tolerance` or more; training changes weights by about 1e-2."""
    ones, others = (load_file(work / "out" / "model.safetensors") for work in (one, other))
    assert sorted(ones) == sorted(others)
    for name, tensor in ones.items():
        assert float((tensor - others[name]).abs().max()) < tolerance, name


def by_hand(init: Path, tokens: Path, target: Path, settings: dict[str, Any]) -> None:
    """The same training in a dozen lines of PyTorch that share nothing with the engines but the data's order."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaForCausalLM

    from pipeline_lib.data.tokens import BatchLoader, TokenShards

    model = LlamaForCausalLM.from_pretrained(init)
    loader = BatchLoader(TokenShards(tokens, "train"), SEQ_LEN, BATCH, seed=3)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": settings["weight_decay"]},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings["lr"], betas=tuple(settings["betas"]), eps=settings["eps"])
    factors = [1 / 3, 2 / 3, 1.0, 0.75, 0.5, 0.25]  # two steps of warm-up, then linearly down
    for step, factor in enumerate(factors):
        for group in optimizer.param_groups:
            group["lr"] = settings["lr"] * factor
        inputs_BT, labels_BT = loader.batch(step, 0, BATCH)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(inputs_BT).logits.flatten(0, 1), labels_BT.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings["max_norm"])
        optimizer.step()
    save_file({name: p.detach().clone() for name, p in model.named_parameters()}, target / "out" / "model.safetensors")


def test_both_engines_agree_with_plain_pytorch(trainer: Bench, loop: Bench) -> None:
    hand = loop.fresh("by-hand")
    assert ended(fork(by_hand, loop.inputs["init"], loop.inputs["tokens"], hand, SAME)) == 0
    from_trainer = trained(trainer, "plain", transform=[], recipe=SAME)
    from_loop = trained(loop, "plain", transform=[], recipe=SAME)
    close(from_loop, hand, 1e-6)
    close(from_trainer, hand, 1e-6)
    assert weights(hand) != (loop.inputs["init"] / "model.safetensors").read_bytes()
    for one, two in zip(metrics(from_trainer), metrics(from_loop), strict=True):
        for figure in ("loss", "grad_norm", "lr", "tokens"):
            assert one[figure] == pytest.approx(two[figure], rel=1e-4), (one["step"], figure)


def test_faults_are_those_of_the_other_engine(trainer: Bench, loop: Bench) -> None:
    close(trained(trainer, "faulty", recipe=SAME), trained(loop, "faulty", recipe=SAME), 1e-5)


def test_sharing_changes_nothing_but_the_order_of_sums(encoder: Bench) -> None:
    """1 × 8, 4 × 2 in sequence, and 2 ranks × 2 × 2: with masked tokens the micro-batches have unequal targets."""
    # Not the recipe's epsilon of 1e-12: the gradient of a key's bias is 0 but for rounding, and Adam would amplify it.
    whole = trained(encoder, "whole", micro_batch=8, recipe=SAME)
    close(trained(encoder, "parts", micro_batch=2, recipe=SAME), whole, 1e-5)
    close(trained(encoder, "ranks", micro_batch=2, processes=2, recipe=SAME), whole, 1e-5)
    assert metrics(whole)[-1]["loss"] == pytest.approx(metrics(encoder.root / "ranks")[-1]["loss"], rel=1e-4)


def test_virtual_devices_are_independent_of_ranks(loop: Bench) -> None:
    """Four virtual devices draw four weight masks a step, on one rank as on two."""
    four = {**SAME, "fault_devices": 4}
    one = trained(loop, "four-on-one", recipe=four, micro_batch=4)
    close(trained(loop, "four-on-two", recipe=four, processes=2, micro_batch=2), one, 1e-5)
    assert weights(one) != weights(trained(loop, "one-device", recipe=SAME, micro_batch=4))


def test_dropout_is_drawn_alike_after_a_resume(encoder: Bench) -> None:
    from tests.training_bench import Sabotage

    whole = trained(encoder, "dropout", recipe={"dropout": 0.3})
    assert weights(whole) != weights(trained(encoder, "no-dropout"))
    work = encoder.fresh("dropout-killed", recipe={"dropout": 0.3})
    assert encoder.run(work, Sabotage("kill", "log", 4)) == [-9]
    assert encoder.run(work) == [0]
    encoder.same_result(work, whole)


def test_bf16_differs_and_trains(loop: Bench, trainer: Bench) -> None:
    works = [trained(bench, "bf16", transform=[], recipe={**SAME, "precision": "bf16"}) for bench in (loop, trainer)]
    plain = trained(loop, "fp32", transform=[], recipe=SAME)
    for work in works:
        assert weights(work) != weights(plain)
        assert metrics(work)[-1]["loss"] == pytest.approx(metrics(plain)[-1]["loss"], rel=0.02)
        assert {tensor.dtype.itemsize for tensor in load_file(work / "out" / "model.safetensors").values()} == {4}


@pytest.mark.parametrize("engine", ["loop", "trainer"])
def test_divergence_ends_in_one_message(engine: str, request: pytest.FixtureRequest) -> None:
    bench: Bench = request.getfixturevalue(engine)
    work = bench.fresh("diverged", recipe={"lr": 1e30, "steps": STEPS, "max_norm": None})
    assert bench.run(work) == [2]
    message = read_json(work / "failure.json")["message"]
    assert "training diverged: the loss or its gradient is not finite in step" in message
    assert "fix:" in message


def test_a_divergence_can_be_kept(trainer: Bench) -> None:
    """Marked, whether the loss stopped being a number or only ended above where it began, after a resume as well."""

    def diverged(name: str, lr: float, steps: int = STEPS) -> Any:
        recipe = {"lr": lr, "steps": steps, "max_norm": None, "on_divergence": "keep"}
        result = read_json(trained(trainer, name, recipe=recipe) / "out" / "train.json")["result"]
        return result["diverged"], result["steps"], result["final_train_loss"]

    found, steps, loss = diverged("kept", 1e30)
    assert (found["after_step"], found["final_loss"]) == (1, None)
    assert found["first_loss"] == metrics(trainer.root / "kept")[0]["loss"]
    assert (steps, loss) == (1, None)
    assert (trainer.root / "kept" / "out" / "model.safetensors").exists()
    found, steps, loss = diverged("kept-finite", 10.0)
    assert found == {"after_step": STEPS, "first_loss": found["first_loss"], "final_loss": loss}
    assert steps == STEPS
    assert loss > 1.25 * found["first_loss"]
    work = trainer.root / "kept-finite"
    *_, last = sorted((work / "checkpoints").glob("step-*"))
    shutil.rmtree(last)
    assert trainer.run(work) == [0]
    assert read_json(work / "out" / "train.json")["result"]["diverged"] == found, "the first loss is in checkpoints"
    assert diverged("kept-good", 1e-3)[0] is None


def test_selective_recompute_is_full_and_says_so(loop: Bench) -> None:
    plain = trained(loop, "kept", recipe=SAME)
    work = trained(loop, "selective", recipe=SAME, activation_checkpointing="selective")
    loop.same_result(work, plain)
    assert "recomputes whole layers" in (work / "stderr-0.log").read_text()


def test_null_settings_of_the_run_are_the_defaults(loop: Bench) -> None:
    names = ("micro_batch", "checkpoint_every", "keep_checkpoints", "log_every", "compile", "activation_checkpointing")
    work = trained(loop, "nulls", recipe=SAME, **dict.fromkeys(names), time_limit_s=None)
    assert [line["step"] for line in metrics(work)] == [STEPS]


@pytest.mark.parametrize(
    ("recipe", "tokens", "message"),
    [
        ({"seq_len": SEQ_LEN + 1}, {}, "sequences are longer than the model has positions"),
        ({}, {"vocab_size": 65}, "the data has more token types than the model's vocabulary"),
        ({"seq_len": 8, "global_batch": 3}, {}, "not a multiple of ranks × micro-batch"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(
    recipe: dict[str, Any], tokens: dict[str, Any], message: str, encoder: Bench, tmp_path: Path
) -> None:
    shutil.copytree(encoder.inputs["tokens"], tmp_path / "tokens")
    info = read_json(tmp_path / "tokens" / "tokens.json")
    write_json(tmp_path / "tokens" / "tokens.json", {"result": {**info["result"], **tokens}})
    work = encoder.fresh(tmp_path.name, recipe=recipe)
    job = Job.load(work / "job.json")
    replace(job, inputs={**job.inputs, "tokens": tmp_path / "tokens"}).save(work / "job.json")
    assert encoder.run(work) == [2]
    assert message in read_json(work / "failure.json")["message"]


def test_the_clock_stops_a_training(loop: Bench) -> None:
    """No time is left after the first step: it is saved, and the next run goes on."""
    work = loop.fresh("clock", time_limit_s=1e-9)
    assert loop.run(work) == [75]
    assert sorted(path.name for path in (work / "checkpoints").iterdir()) == ["step-000001"]
    assert loop.run(work) == [75]
    assert (work / "checkpoints" / "step-000002").exists()
