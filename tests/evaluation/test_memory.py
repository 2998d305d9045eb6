"""The memory account holds against the allocator, in every arm; the task puts the arms into one table."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from pipeline_lib.evaluation.base import Subject
from pipeline_lib.evaluation.tasks.memory import MemoryTask, Settings, open_task
from pipeline_lib.evaluation.training_memory import measure
from pipeline_lib.models import bert, mistral
from pipeline_lib.models.memory import Account, Activations, Measured
from pipeline_lib.transforms.apply import apply

ARMS = ("full", "lora", "relora", "relora_ternary")
SIZES = {"dim": 64, "layers": 3, "heads": 4, "kv_heads": 2, "ffn": 160, "vocab": 512, "max_seq_len": 64}


def subject(model: Any = None) -> Subject:
    torch.manual_seed(0)
    nothing: Any = None
    return Subject((model or mistral.build(SIZES)).eval(), nothing, None, 8)


WIDE = {**SIZES, "dim": 256, "layers": 2, "kv_heads": 4, "ffn": 1024, "vocab": 4096}


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize(
    ("precision", "recompute", "base"), [("fp32", "none", "fp32"), ("bf16", "full", "bf16"), ("fp32", "full", "bf16")]
)
def test_the_account_is_within_a_tenth_of_the_allocators_peak(
    precision: Any, recompute: Any, base: Any, arm: str
) -> None:
    """Where activations are most of it, and where weights, their copies and their gradients are."""
    given = {"rank": 8, "precision": precision, "activation_checkpointing": recompute, "base": base}
    for sizes, micro_batch, seq_len in ((SIZES, 2, 64), (WIDE, 1, 16)):
        settings = Settings(micro_batch=micro_batch, seq_len=seq_len, **given)
        found = measure(subject(mistral.build(sizes)), arm, settings, 0)
        assert found.account.total() == pytest.approx(found.peak, rel=0.1), sizes


def test_a_recomputed_block_shows_its_inside() -> None:
    """What is recomputed is counted; and autocast's copies of weights, which half precision alone has."""
    settings = {"micro_batch": 1, "seq_len": 16, "rank": 8}
    kept, again = (
        measure(subject(), "full", Settings(**settings, activation_checkpointing=how), 0).kept
        for how in ("none", "full")
    )
    assert (again.recompute, kept.recompute) == (True, False)
    assert again.block == pytest.approx(kept.block, rel=0.1)
    assert again.saved < kept.saved / 2
    linears = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 160 * 64
    assert (again.copies, again.gradient, again.block_gradient) == (0, 4 * 512 * 64, 4 * 160 * 64)
    half = Settings(**settings, activation_checkpointing="full", precision="bf16")
    assert measure(subject(), "full", half, 0).kept.copies == 2 * linears
    assert measure(subject(), "relora_ternary", half, 0).kept.copies == 2 * 8 * (4 * 64 + 2 * 96 + 3 * 224)


def test_an_encoder_is_accounted_for_as_well() -> None:
    sizes = {key: value for key, value in SIZES.items() if key != "kv_heads"}
    found = measure(subject(bert.build(sizes)), "relora_ternary", Settings(micro_batch=2, seq_len=64, rank=8), 0)
    assert found.account.total() == pytest.approx(found.peak, rel=0.1)


@pytest.mark.parametrize("arm", ARMS)
def test_a_small_measurement_speaks_for_more_layers_and_tokens(arm: str) -> None:
    """How two layers of a large model, on short sequences of two lengths, speak for all of it."""
    settings = {"micro_batch": 1, "rank": 8, "activation_checkpointing": "full", "precision": "bf16"}
    short, shorter = (
        measure(subject(mistral.build({**SIZES, "layers": 2})), arm, Settings(seq_len=length, **settings), 0)
        for length in (32, 16)
    )
    large = measure(subject(mistral.build({**SIZES, "layers": 5})), arm, Settings(seq_len=64, **settings), 0)
    grown = short.at(5, 64, shorter)
    assert grown.total() == pytest.approx(large.account.total(), rel=0.01)
    assert (grown.weights, grown.adapters, grown.host) == (
        large.account.weights,
        large.account.adapters,
        large.account.host,
    )
    assert grown.total() == pytest.approx(large.peak, rel=0.1)


def test_components_by_hand() -> None:
    settings = Settings(micro_batch=1, seq_len=16, rank=8)
    linears = 3 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 160 * 64)
    adapters = 4 * 8 * 3 * (2 * (64 + 64) + 2 * (32 + 64) + 3 * (160 + 64))
    rest = 4 * (2 * 512 * 64 + 7 * 64)
    full = measure(subject(), "full", settings, 0).account
    assert full.gradients == 4 * linears + rest
    assert full.optimizer == 2 * full.gradients
    lora, relora, packed = (measure(subject(), arm, settings, 0).account for arm in ARMS[1:])
    assert (lora.adapters, lora.gradients, lora.host) == (adapters, adapters, 0)
    assert (relora.adapters, relora.gradients, relora.host) == (adapters, adapters + rest, 4 * linears)
    bytes_of_codes = 3 * (2 * 64 * 13 + 2 * 32 * 13 + 2 * 160 * 13 + 64 * 32)
    assert relora.weights - packed.weights == 4 * linears - bytes_of_codes - 4 * 3 * 7


def test_the_total_of_one_and_of_several_micro_batches() -> None:
    account = Account(weights=5, adapters=1, gradients=10, optimizer=20, activations=7)
    assert account.total() == 43
    assert account.total(accumulates=False) == 36
    kept = Activations(saved=100, input=3, block=40, layers=2, recompute=False, logits=5, gradient=41)
    assert (kept.total(), kept.total(4)) == (141, 221)
    again = Activations(saved=100, input=3, block=50, layers=2, recompute=True, logits=5, copies=6, block_gradient=1)
    assert (again.total(), again.total(4)) == (152, 170), "at the loss: 40 + 6 a block, from four blocks on the larger"
    half = replace(again, saved=60, input=2, block=30, logits=3)
    assert again.of_tokens(0.5, half, 0.25) == replace(again, saved=180, input=5, block=90, logits=9)
    one, two = (Measured(account, Account(weights=2), found, tokens, 0) for found, tokens in ((again, 8), (half, 4)))
    assert one.at(3, 8, two) == Account(7, 1, 10, 20, 161)


def test_the_task_gives_one_table() -> None:
    task = open_task(Settings(micro_batch=2, seq_len=64, rank=8).semantic(), {}, None)  # type: ignore[arg-type]
    found = task.run(subject(), 0)
    shares = [found.metrics[f"{arm}.share"] for arm in ARMS]
    assert shares[0] == 1
    assert shares[1] < shares[3] < shares[2] < 1, "LoRA trains least; packed weights are the smallest"
    assert found.metrics["relora.mem_host_mib"] > 0
    assert found.n_samples == 4
    assert found.conditions["seq_len"] == 64


def test_under_a_transform_every_arm_has_it() -> None:
    one = subject()
    context = apply(one.model, [{"type": "ternary"}], seed=0).context
    under = Subject(one.model, one.tokenizer, context, 8)
    found = MemoryTask(Settings(micro_batch=2, seq_len=64, rank=8)).run(under, 0)
    assert {name.split(".")[0] for name in found.metrics} == {"full", "lora", "relora"}
    plain = MemoryTask(Settings(arms=("relora_ternary",), micro_batch=2, seq_len=64, rank=8)).run(subject(), 0)
    assert found.metrics["relora.mem_weights_mib"] == plain.metrics["relora_ternary.mem_weights_mib"]
    assert "relora_ternary.share" not in plain.metrics
