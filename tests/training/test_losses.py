"""Losses per example, masks for encoders, and state that outlives sharding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pipeline_lib.data.masking import hide_tokens, mask_seed
from pipeline_lib.training.losses import IGNORED, count_targets, cross_entropy_per_example
from pipeline_lib.training.state import full_state, load_optimizer, load_values, load_weights, save_state

VOCAB, MASK = 50, 4


def test_the_loss_of_each_sequence_is_its_own() -> None:
    generator = torch.Generator().manual_seed(0)
    logits_BTV = torch.randn(3, 5, VOCAB, generator=generator)
    labels_BT = torch.randint(VOCAB, (3, 5), generator=generator)
    labels_BT[1, 2:] = IGNORED
    labels_BT[2] = IGNORED
    loss_B = cross_entropy_per_example(logits_BTV, labels_BT)
    by_hand = [
        -sum(float(logits_BTV[b, t].log_softmax(0)[labels_BT[b, t]]) for t in range(n)) for b, n in ((0, 5), (1, 2))
    ]
    assert loss_B.tolist() == pytest.approx([*by_hand, 0.0], rel=1e-5)
    assert count_targets(labels_BT) == 7
    whole = F.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten())
    assert float(loss_B.sum() / 7) == pytest.approx(float(whole), rel=1e-6)


def test_the_loss_is_summed_in_fp32() -> None:
    logits_BTV = torch.zeros(1, 4096, 8, dtype=torch.bfloat16)
    loss_B = cross_entropy_per_example(logits_BTV, torch.zeros(1, 4096, dtype=torch.int64))
    assert loss_B.dtype == torch.float32
    assert float(loss_B[0]) == pytest.approx(4096 * torch.log(torch.tensor(8.0)).item(), rel=1e-5)


def test_masks_have_their_shares() -> None:
    """15 % targets; of them 80 % masked, 10 % random, 10 % kept (± 5 standard errors); special tokens never."""
    count = 200_000
    text_T = torch.randint(5, VOCAB, (count,), generator=torch.Generator().manual_seed(1))
    special_T = torch.arange(count) % 10 == 0
    shown_T, labels_T = hide_tokens(text_T, special_T, MASK, VOCAB, 0.15, torch.Generator().manual_seed(2))
    target_T = labels_T != IGNORED
    assert not (target_T & special_T).any()
    assert torch.equal(labels_T[target_T], text_T[target_T])
    assert torch.equal(shown_T[~target_T], text_T[~target_T])
    free = count * 0.9
    for found, share, of in (
        (int(target_T.sum()), 0.15, free),
        # A random token is the mask or the token itself once in VOCAB draws each.
        (int((shown_T == MASK)[target_T].sum()), 0.8 + 0.1 / VOCAB, float(target_T.sum())),
        (int((shown_T == text_T)[target_T].sum()), 0.1 + 0.1 / VOCAB, float(target_T.sum())),
    ):
        assert abs(found - share * of) < 5 * (of * share * (1 - share)) ** 0.5


def test_masks_of_sequences_and_steps_are_unrelated() -> None:
    def mask(seed: int, step: int, sequence: int) -> tuple[bool, ...]:
        text_T = torch.full((64,), 7)
        generator = torch.Generator().manual_seed(mask_seed(seed, step, sequence))
        return tuple((hide_tokens(text_T, text_T < 0, MASK, VOCAB, 0.5, generator)[1] != IGNORED).tolist())

    places = [(seed, step, sequence) for seed in (0, 1) for step in range(4) for sequence in range(4)]
    assert len({mask(*place) for place in places}) == len(places)
    assert mask(0, 1, 2) == mask(0, 1, 2)


class Tied(nn.Module):
    """Two matrices, one of them under two names, and a persistent buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(6, 4), nn.Linear(4, 4), nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, ids_B: torch.Tensor) -> torch.Tensor:
        return self.head(self.inner(self.embed(ids_B)) * self.scale)


def trained(steps: int) -> tuple[Tied, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    advance(model, optimizer, steps)
    return model, optimizer


def advance(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    ids_B = torch.arange(6)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(ids_B), ids_B.flip(0)).backward()
        optimizer.step()


def test_state_goes_and_comes_back_exactly(tmp_path: Path) -> None:
    model, optimizer = trained(3)
    save_state(tmp_path, model, optimizer, {"step": 3})
    assert sorted(full_state(model)) == ["embed.weight", "inner.bias", "inner.weight", "scale"], "tied weights once"
    advance(model, optimizer, 2)
    other, fresh = trained(0)
    load_weights(tmp_path, other)
    load_optimizer(tmp_path, other, fresh)
    assert load_values(tmp_path) == {"step": 3}
    advance(other, fresh, 2)
    for name, tensor in full_state(model).items():
        assert torch.equal(tensor, full_state(other)[name]), name
    assert other.head.weight is other.embed.weight


def test_nothing_pickled_is_written(tmp_path: Path) -> None:
    save_state(tmp_path, *trained(1), {"step": 1})
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors", ".json"}


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    save_state(tmp_path, *trained(1), {"step": 1})
    with pytest.raises(KeyError, match=r"differ in"):
        load_weights(tmp_path, nn.Linear(4, 4))
