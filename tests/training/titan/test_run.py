"""Training with torchtitan: against an independent loop, under other layouts of the same work, and when it goes wrong.

Kills, damage, SIGTERM and the change of ranks are in the conformance class, which runs on this engine too.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file

from pipeline_lib.artifacts.job import Job
from pipeline_lib.config.errors import Stopped, UserError
from pipeline_lib.config.registry import TRANSFORMS
from pipeline_lib.data.tokens import BatchLoader, TokenShards
from pipeline_lib.models import llama
from pipeline_lib.models.initial import initial_weight
from pipeline_lib.training.checkpoints import newest_good
from pipeline_lib.training.titan.run import run
from tests.training.titan import recorder
from tests.training.titan.jobs import FAULTS, again, losses, make_job, result


def by_hand(job: Job) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The same training written out with the Hugging Face model: losses and final weights."""
    recipe, steps = job.settings["recipe"], job.settings["recipe"]["steps"]
    model = llama.build(job.settings["model"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_weight(name, tuple(parameter.shape), 32, job.settings["seed"]))
    loader = BatchLoader(TokenShards(job.inputs["tokens"], "train"), 16, 8, job.settings["seed"])
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    found = []
    for step in range(steps):
        warm = (step + 1) / 3
        rate = warm if step < 2 else 1 - (step - 2) / (steps - 2)
        optimizer.param_groups[0]["lr"] = recipe["lr"] * rate
        inputs_BT, labels_BT = loader.batch(step, 0, 8)
        loss = torch.nn.functional.cross_entropy(model(inputs_BT).logits.flatten(0, 1), labels_BT.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe["max_norm"])
        optimizer.step()
        found.append(loss.item())
    return found, {name: value.detach() for name, value in model.state_dict().items()}


@pytest.fixture(scope="module")
def plain(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Job:
    job = make_job(tmp_path_factory.mktemp("plain"), inputs, recipe={"max_norm": 0.3})
    run(job)
    return job


def test_it_is_the_training_that_a_plain_loop_does(plain: Job) -> None:
    """Data order, initial weights, loss, clipping, AdamW, schedule: all of it."""
    expected, weights = by_hand(plain)
    assert losses(plain) == pytest.approx(expected, rel=1e-5)
    found = load_file(plain.out / "model.safetensors")
    assert found.keys() == weights.keys()
    for name, value in found.items():
        assert torch.allclose(value, weights[name], rtol=1e-3, atol=2e-5), name
    assert result(plain)["final_train_loss"] == pytest.approx(expected[-1], rel=1e-5)
    assert result(plain)["parameters"] == sum(value.numel() for value in weights.values())


def test_gradients_were_clipped(plain: Job) -> None:
    lines = [json.loads(line) for line in (plain.out / "log" / "metrics.jsonl").read_text().splitlines()]
    assert max(line["grad_norm"] for line in lines) > 0.3, "else the test above says nothing of clipping"


def test_micro_batches_change_nothing_but_the_order_of_sums(faulty: Job, inputs: dict, tmp_path: Path) -> None:
    """8 sequences at once, or 2 at a time: faults depend on the sequence, and the mean is over the global batch."""
    job = make_job(tmp_path, inputs, FAULTS, micro_batch=2)
    run(job)
    assert losses(job) == pytest.approx(losses(faulty), rel=1e-4)
    assert losses(job)[0] == pytest.approx(losses(faulty)[0], rel=1e-6)


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_activation_checkpointing_changes_nothing(faulty: Job, inputs: dict, tmp_path: Path, mode: str) -> None:
    job = make_job(tmp_path, inputs, FAULTS, activation_checkpointing=mode)
    run(job)
    assert (job.out / "model.safetensors").read_bytes() == (faulty.out / "model.safetensors").read_bytes()


def test_a_stopped_training_goes_on_to_the_same_bytes(faulty: Job, inputs: dict, tmp_path: Path) -> None:
    job = make_job(tmp_path, inputs, FAULTS, time_limit_s=0.0)
    with pytest.raises(Stopped, match="after step 1 of 6"):
        run(job)
    assert not (job.out / "model.safetensors").exists()
    finished = again(job, time_limit_s=None)
    run(finished)
    for name in ("model.safetensors", "check.safetensors"):
        assert (finished.out / name).read_bytes() == (faulty.out / name).read_bytes()
    assert result(finished) == result(faulty)
    assert losses(finished) == losses(faulty)


def test_a_finished_training_is_only_exported_again(faulty: Job, tmp_path: Path) -> None:
    """Killed after the last step, before publishing."""
    newest = newest_good(faulty.work / "checkpoints")
    assert newest is not None
    assert newest.name == "step-000006"
    finished = again(faulty)
    run(finished)
    assert (finished.out / "model.safetensors").read_bytes() == (faulty.out / "model.safetensors").read_bytes()
    assert result(finished) == result(faulty)


def test_old_checkpoints_are_pruned(inputs: dict, tmp_path: Path) -> None:
    job = make_job(tmp_path, inputs, checkpoint_every=1, keep_checkpoints=2)
    run(job)
    assert sorted(path.name for path in (job.work / "checkpoints").iterdir()) == ["step-000005", "step-000006"]


def test_a_training_that_diverges_says_so_and_publishes_nothing(inputs: dict, tmp_path: Path) -> None:
    job = make_job(tmp_path, inputs, recipe={"lr": 1e38}, checkpoint_every=1, log_every=100)
    with pytest.raises(UserError, match=r"not finite in step 2 of 6(.|\n)*step-000001") as caught:
        run(job)
    assert "lower recipe.lr" in str(caught.value)
    assert list(job.out.iterdir()) == []
    assert [path.name for path in (job.work / "checkpoints").iterdir()] == ["step-000001"]


def test_a_vocabulary_that_is_too_small(inputs: dict, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="vocabulary"):
        run(make_job(tmp_path, inputs, model={"vocab": 60}))


def test_it_starts_from_another_training(faulty: Job, inputs: dict, tmp_path: Path) -> None:
    from pipeline_lib.stages import convert
    from tests.training.titan.test_convert import convert_job

    checkpoint = convert_job(faulty, tmp_path / "checkpoint")
    convert.run(checkpoint)
    job = make_job(tmp_path / "onwards", {**inputs, "init": checkpoint.out}, recipe={"lr": 1e-30, "weight_decay": 0.0})
    run(job)
    start, end = (load_file(path / "model.safetensors") for path in (checkpoint.out, job.out))
    assert all(torch.equal(start[name], end[name]) for name in start)
    with pytest.raises(UserError, match="do not fit"):
        run(make_job(tmp_path / "wider", {**inputs, "init": checkpoint.out}, model={"ffn": 64}))


def test_bf16_reaches_the_faults_on_a_single_rank(inputs: dict, tmp_path: Path) -> None:
    """FSDP2 casts weights before the forward pass, so that one rank and many flip bits of the same dtype."""
    TRANSFORMS.register("recorder", recorder.__name__)
    recorder.SEEN.clear()
    job = make_job(tmp_path, inputs, [{"type": "recorder"}], recipe={"precision": "bf16"})
    run(job)
    assert len(recorder.SEEN) == 2 * (7 * 2 + 1)
    assert set().union(*recorder.SEEN.values()) == {"torch.bfloat16"}
    state = load_file(job.out / "model.safetensors")
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert any((value != value.bfloat16().float()).any() for value in state.values()), "master weights are fp32"
    assert losses(job)[-1] < losses(job)[0]


@pytest.mark.slow
def test_compiled_blocks_see_the_same_faults(inputs: dict, tmp_path: Path) -> None:
    shape = {"recipe": {"steps": 2, "warmup_steps": 1}, "model": {"layers": 1}}
    eager, compiled = (make_job(tmp_path / str(flag), inputs, FAULTS, compile=flag, **shape) for flag in (False, True))
    run(eager)
    run(compiled)
    assert losses(compiled) == pytest.approx(losses(eager), rel=1e-5)


@pytest.mark.slow
def test_two_processes_by_the_launcher(faulty: Job, inputs: dict, tmp_path: Path) -> None:
    from pipeline_lib.training.run import run as launch

    job = make_job(tmp_path, inputs, FAULTS, processes=2)
    with patch.dict(os.environ):  # the launcher leaves variables to its ranks there
        launch(job)
    assert losses(job) == pytest.approx(losses(faulty), rel=2e-4)
    assert result(job)["parameters"] == result(faulty)["parameters"]
