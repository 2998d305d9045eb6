"""Philox and the keys of streams."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline_lib.numerics.philox import LOW, as_signed, philox4x32, philox4x32_int, philox4x32_numpy
from pipeline_lib.numerics.streams import _traceable_step_key, site_key, step_key

# Known answers of Philox4x32-10 (Random123): counter and key -> words.
KNOWN = [
    ((0, 0, 0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((LOW,) * 6, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("given", "words"), KNOWN)
def test_known_answers(given: tuple[int, ...], words: tuple[int, ...]) -> None:
    assert philox4x32_int(*given) == words
    assert tuple(int(w) for w in philox4x32(*(torch.tensor(v) for v in given))) == words


def test_the_three_forms_agree() -> None:
    rng = np.random.default_rng(0)
    counters = rng.integers(0, 2**32, (4, 33))
    key = int(rng.integers(0, 2**63)) | 1 << 63
    even, odd = philox4x32_numpy(counters[[0, 2]].astype(np.uint64), counters[[1, 3]].astype(np.uint32), key)
    k0, k1 = torch.tensor(key & LOW), torch.tensor(key >> 32)
    words = philox4x32(*(torch.from_numpy(c) for c in counters), k0, k1)
    assert [w.tolist() for w in words] == [w.tolist() for w in (even[0], odd[0], even[1], odd[1])]
    column = [int(c) for c in counters[:, 7]]
    assert philox4x32_int(*column, key & LOW, key >> 32) == tuple(int(w[7]) for w in words)


class Narrow(int):
    """An integer that refuses to leave the range of int64, whose overflow compiled code does not define."""

    def _checked(self, value: int) -> Narrow:
        assert -(2**63) <= value < 2**63, "int64 overflow"
        return Narrow(value)

    def __mul__(self, other: int) -> Narrow:
        return self._checked(int(self) * other)

    def __add__(self, other: int) -> Narrow:
        return self._checked(int(self) + other)

    def __lshift__(self, other: int) -> Narrow:
        return self._checked(int(self) << other)

    def __rshift__(self, other: int) -> Narrow:
        return Narrow(int(self) >> other)

    def __and__(self, other: int) -> Narrow:
        return Narrow(int(self) & other)

    def __xor__(self, other: int) -> Narrow:
        return Narrow(int(self) ^ other)


def test_the_tensor_form_never_overflows_int64() -> None:
    """It did once: inductor's C++ then gave other keys than eager mode."""
    for given, words in KNOWN:
        assert philox4x32(*(Narrow(v) for v in given)) == words  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="overflow"):
        Narrow(LOW) * LOW


def test_site_keys_differ_in_every_part_and_fit_int64() -> None:
    names = [
        (0, "a.b", "weight"),
        (1, "a.b", "weight"),
        (0, "a.c", "weight"),
        (0, "a.b", "input"),
        (0, "a", "b.weight"),
    ]
    keys = [site_key(*name) for name in names]
    assert len(set(keys)) == len(keys)
    assert all(-(2**63) <= key < 2**63 for key in keys)


def test_the_site_key_is_fixed_for_good() -> None:
    assert site_key(1, "model.layers.0.mlp.gate_proj", "weight") == -8455453753943965544


@pytest.mark.parametrize("step", [0, 1, 12345, 2**31, 2**40 + 17])
def test_step_keys_agree_in_all_forms(step: int) -> None:
    site = site_key(3, "x", "input")
    at = torch.tensor(step)
    key = step_key(site, at)
    assert key.shape == ()
    assert key.dtype == torch.int64
    assert int(key) == int(_traceable_step_key(site, at))
    compiled = torch.compile(step_key, backend="aot_eager", fullgraph=True, dynamic=False)
    assert int(compiled(site, at)) == int(key)


def test_step_keys_do_not_repeat() -> None:
    keys = {int(step_key(site_key(0, site, "weight"), torch.tensor(s))) for site in "abcd" for s in range(500)}
    assert len(keys) == 2000


def test_as_signed() -> None:
    assert (as_signed(2**64 - 1), as_signed(2**63), as_signed(5)) == (-1, -(2**63), 5)
