"""The memory account holds against the allocator, in every arm; the task puts the arms into one table."""

from __future__ import annotations

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


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_account_is_within_a_tenth_of_the_allocators_peak(recompute: Any, precision: Any) -> None:
    settings = Settings(
        micro_batch=2, seq_len=64, rank=8, activation_checkpointing=recompute, precision=precision, base="bf16"
    )
    for arm in ARMS:
        found = measure(subject(), arm, settings, 0)
        assert found.account.total() == pytest.approx(found.peak, rel=0.1), arm


def test_an_encoder_is_accounted_for_as_well() -> None:
    sizes = {key: value for key, value in SIZES.items() if key != "kv_heads"}
    found = measure(subject(bert.build(sizes)), "relora_ternary", Settings(micro_batch=2, seq_len=64, rank=8), 0)
    assert found.account.total() == pytest.approx(found.peak, rel=0.1)


def test_the_account_of_more_layers_is_that_of_the_larger_model() -> None:
    """How two layers of a large model speak for all of them."""
    settings = Settings(micro_batch=2, seq_len=64, rank=8, activation_checkpointing="full")
    for arm in ARMS:
        small = measure(subject(mistral.build({**SIZES, "layers": 2})), arm, settings, 0)
        large = measure(subject(mistral.build({**SIZES, "layers": 5})), arm, settings, 0)
        grown = small.at(5)
        assert grown.total() == pytest.approx(large.account.total(), rel=1e-3), arm
        assert (grown.weights, grown.adapters, grown.host) == (
            large.account.weights,
            large.account.adapters,
            large.account.host,
        )
        assert grown.total() == pytest.approx(large.peak, rel=0.1), arm


def test_twice_the_tokens_are_twice_the_activations() -> None:
    settings = {"seq_len": 32, "rank": 8, "activation_checkpointing": "full"}
    one = measure(subject(), "relora_ternary", Settings(micro_batch=2, **settings), 0)
    two = measure(subject(), "relora_ternary", Settings(micro_batch=4, **settings), 0)
    assert one.at(3, 2.0).total() == pytest.approx(two.account.total(), rel=0.02)


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
    kept = Activations(saved=100, input=3, block=40, layers=2, recompute=False, logits=5)
    assert (kept.total(), kept.total(4)) == (140, 220)
    again = Activations(saved=100, input=3, block=50, layers=2, recompute=True, logits=5)
    assert (again.total(), again.total(4)) == (150, 156)
    assert Measured(account, Account(weights=2), kept, 0).at(3) == Account(7, 1, 10, 20, 180)


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
