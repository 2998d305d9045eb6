"""Triton kernel of the bit-flip sampler: bit for bit the stream of `flip_reference`, on CUDA.

One program flips one tile of one row: it copies the tile with the constant and dense parts, waits, and then toggles the
sparse hits by atomic XOR on the 32-bit words of the output. No tile but its own is written, except that a word may
straddle two tiles where rows are not aligned to words; there the neighbour's bytes are toggled by zero. With a gate it
then reads its tile back from the L2 cache and zeroes it, or the gradient, where the flipped value is not below it.

Both groups of bits, copy and gate are one launch. Nothing is tuned: a launch is specialised on the plan's shape, the
width of elements, whether rows are multiples of 16 elements and whether the input is strided, never on a step.

Imported only where it is used: by CUDA tensors, and by tests under Triton's interpreter (TRITON_INTERPRET=1).
"""

# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false
# (kernels are Python that Triton compiles; a type checker sees only their surface)

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline_lib.numerics.flip_plan import TILE_WORDS, FlipPlan
from pipeline_lib.numerics.philox import as_signed

_SIGNED = {8: torch.int8, 16: torch.int16, 32: torch.int32}


@triton.jit
def _philox(c0, c1, c2, c3, k0, k1):
    for _ in tl.static_range(10):
        product0 = c0.to(tl.uint64) * 0xD2511F53
        product1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (product1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = product1.to(tl.uint32)
        c3 = product0.to(tl.uint32)
        k0 = k0 + tl.full((), 0x9E3779B9, tl.uint32)
        k1 = k1 + tl.full((), 0xBB67AE85, tl.uint32)
    return c0, c1, c2, c3


@triton.jit(do_not_specialize=["site_key", "tag"])
def _step_key_kernel(out, step, site_key, tag):
    at = tl.load(step)
    zero = tl.full((), 0, tl.uint32)
    site = tl.full((), 0, tl.int64) + site_key
    k0, k1 = site.to(tl.uint32), (site >> 32).to(tl.uint32)
    w0, w1, _, _ = _philox(at.to(tl.uint32), (at >> 32).to(tl.uint32), zero, zero + tag.to(tl.uint32), k0, k1)
    tl.store(out, (w0.to(tl.uint64) | (w1.to(tl.uint64) << 32)).to(tl.int64, bitcast=True))


@triton.jit
def _toggle(words, word, hit, count, first, low, high, mask, BITS: tl.constexpr):
    # `first`: flat index of the tile's element 0; [low, high): the elements of the tile that the tensor covers.
    position = (word & 0x1FFFF).to(tl.int32)
    element = position // BITS
    bit = position % BITS
    chosen = ((tl.full((), 1, tl.uint32) << bit.to(tl.uint32)) & mask) != 0
    inside = (hit < count) & (element >= low) & (element < high) & chosen
    # `first` may be negative (a tensor that starts inside a tile), an address inside the tensor is not.
    flat = tl.where(inside, first + element, 0)
    shift = (flat % (32 // BITS)).to(tl.int32) * BITS + bit
    toggled = (tl.full((), 1, tl.uint32) << shift.to(tl.uint32)).to(tl.int32, bitcast=True)
    tl.atomic_xor(words + flat // (32 // BITS), toggled, mask=inside, sem="relaxed")


@triton.jit
def _count(table, base, length, tag: tl.constexpr, tile, row, k0, k1, LENGTH: tl.constexpr):
    zero = tl.full((), 0, tl.uint32)
    w0, w1, _, _ = _philox(tile, row, zero, tl.full((), tag, tl.uint32), k0, k1)
    # Thresholds are stored with the top bit flipped, so that a signed comparison orders them.
    u = ((w0.to(tl.uint64) | (w1.to(tl.uint64) << 32)) ^ 0x8000000000000000).to(tl.int64, bitcast=True)
    j = tl.arange(0, LENGTH)
    threshold = tl.load(table + j, mask=j < length, other=0)
    return base + tl.sum(((u >= threshold) & (j < length)).to(tl.int32), 0)


@triton.jit
def _sparse(
    words, count, mask, tag: tl.constexpr, tile, row, k0, k1, first, low, high, Q: tl.constexpr, BITS: tl.constexpr
):
    c3 = tl.full((), tag, tl.uint32)
    lanes = tl.zeros([Q], tl.uint32)
    for call0 in range(0, (count + 3) // 4, Q):
        call = call0 + tl.arange(0, Q)
        h0, h1, h2, h3 = _philox(tile + lanes, row + lanes, (call + 1).to(tl.uint32), c3 + lanes, k0, k1)
        _toggle(words, h0, call * 4, count, first, low, high, mask, BITS)
        _toggle(words, h1, call * 4 + 1, count, first, low, high, mask, BITS)
        _toggle(words, h2, call * 4 + 2, count, first, low, high, mask, BITS)
        _toggle(words, h3, call * 4 + 3, count, first, low, high, mask, BITS)


@triton.jit
def _dense_words(digits, tile, row, k0, k1, K: tl.constexpr, TW: tl.constexpr):
    call = tl.arange(0, TW // 4).to(tl.uint32)
    zero = tl.zeros([TW // 4], tl.uint32)
    m0 = zero
    m1 = zero
    m2 = zero
    m3 = zero
    for j in tl.static_range(K):
        digit = tl.load(digits + j).to(tl.uint32, bitcast=True)
        r0, r1, r2, r3 = _philox(tile + zero, row + zero, call, zero + ((2 << 28) + j), k0, k1)
        m0 = (m0 & r0) | (digit & (m0 | r0))
        m1 = (m1 & r1) | (digit & (m1 | r1))
        m2 = (m2 & r2) | (digit & (m2 | r2))
        m3 = (m3 & r3) | (digit & (m3 | r3))
    return tl.reshape(tl.join(tl.join(m0, m2), tl.join(m1, m3)), [TW])


@triton.jit
def _elements_of(m, BITS: tl.constexpr, TW: tl.constexpr):
    # Words to elements, those of lower index from the lower bits.
    if BITS == 32:
        return m
    elif BITS == 16:  # noqa: RET505 (Triton compiles only the branch that is taken, and so needs the else)
        return tl.reshape(tl.join(m & 0xFFFF, m >> 16), [TW * 2])
    else:
        low = tl.join(m & 0xFF, (m >> 16) & 0xFF)
        return tl.reshape(tl.join(low, tl.join((m >> 8) & 0xFF, m >> 24)), [TW * 4])


@triton.jit
def _tile_of(program, tiles, elements, start, TE: tl.constexpr):
    """Of a program: row, tile of the row's stream, its elements low .. high - 1 that the tensor covers, and the flat
    index in the tensor of its element 0 (negative if the tensor starts inside the tile). All int64: tensors may have
    more than 2^31 elements."""
    row = (program // tiles).to(tl.int64)
    tile = start // TE + program % tiles
    before = tile * TE - start
    low = tl.maximum(-before, 0)
    high = tl.minimum(elements - before, TE)
    return row, tile, low, high, row * elements + before


@triton.jit
def _load(
    x, first, row, e, low, high, vector, elements, n1, n2, s_row, s0, s1, s2, TE: tl.constexpr, STRIDED: tl.constexpr,
    CACHE: tl.constexpr = "",
):  # fmt: skip
    if STRIDED:
        inside = (e >= low) & (e < high)
        at = tl.where(inside, first - row * elements + e, 0).to(n2.dtype)  # divisions are dear: 32 bits where they do
        outer = at // n2
        offset = (outer // n1).to(tl.int64) * s0 + (outer % n1).to(tl.int64) * s1 + (at % n2).to(tl.int64) * s2
        value = tl.load(x + row * s_row + offset, mask=inside, other=0)
    else:
        if vector:
            value = tl.load(x + first // 16 * 16 + e, cache_modifier=CACHE)  # so that the compiler sees it
        else:
            value = tl.load(x + first + e, mask=(e >= low) & (e < high), other=0, cache_modifier=CACHE)
    return value


@triton.jit
def _store(out, first, e, low, high, vector, value):
    if vector:
        tl.store(out + first // 16 * 16 + e, value)
    else:
        tl.store(out + first + e, value, mask=(e >= low) & (e < high))


@triton.jit
def _gated(value, chosen, gate, BITS: tl.constexpr):
    # Non-negative floats are ordered like their bits, infinity and then NaN above all.
    magnitude = value & ((1 << (BITS - 1)) - 1)
    return tl.where(magnitude < gate, chosen, 0)


@triton.jit(
    do_not_specialize=["tiles", "n1", "n2", "s_row", "s0", "s1", "s2", "gate", "constant"],
    do_not_specialize_on_alignment=["key", "first_row", "first_element"],
)
def _flip_kernel(
    x, out, words, gradient, key, first_row, first_element, elements, tiles, n1, n2, s_row, s0, s1, s2, gate, constant,
    digits, table, bases, lengths, masks,
    K: tl.constexpr, COMPONENTS: tl.constexpr, LENGTH: tl.constexpr, COPY: tl.constexpr, GATE: tl.constexpr,
    STRIDED: tl.constexpr, BITS: tl.constexpr, Q: tl.constexpr, TW: tl.constexpr,
):  # fmt: skip
    TE: tl.constexpr = TW * (32 // BITS)  # elements of a tile
    row, tile, low, high, first = _tile_of(tl.program_id(0), tiles, elements, tl.load(first_element), TE)
    k = tl.load(key)
    k0, k1 = k.to(tl.uint32), (k >> 32).to(tl.uint32)
    c0, c1 = tile.to(tl.uint32), (tl.load(first_row) + row).to(tl.uint32)
    hits = 0
    for c in tl.static_range(COMPONENTS):
        hits += _count(
            table + c * LENGTH, tl.load(bases + c), tl.load(lengths + c),
            (c if c < 2 else c + 1) << 28, c0, c1, k0, k1, LENGTH,
        )  # fmt: skip
    # Masked accesses are not vectorised: whole tiles at aligned places go without.
    vector = (low == 0) & (high == TE) & (first % 16 == 0)
    e = tl.arange(0, TE)
    if (K > 0) or COPY:
        value = _load(x, first, row, e, low, high, vector, elements, n1, n2, s_row, s0, s1, s2, TE, STRIDED)
        value ^= constant.to(x.dtype.element_ty)
        if K > 0:
            value ^= _elements_of(_dense_words(digits, c0, c1, k0, k1, K, TW), BITS, TW).to(x.dtype.element_ty)
        if GATE:  # noqa: SIM102 (a constant: without a gate the rest is not compiled)
            if hits == 0:  # the value is final
                chosen = value
                if GATE == 2:
                    chosen = _load(gradient, first, row, e, low, high, vector, elements, 1, 1, 0, 0, 0, 0, TE, False)
                value = _gated(value, chosen, gate, BITS)
        _store(out, first, e, low, high, vector, value)
        tl.debug_barrier()
    for c in tl.static_range(COMPONENTS):
        count = _count(
            table + c * LENGTH, tl.load(bases + c), tl.load(lengths + c),
            (c if c < 2 else c + 1) << 28, c0, c1, k0, k1, LENGTH,
        )  # fmt: skip
        mask = tl.load(masks + c).to(tl.uint32)
        _sparse(words, count, mask, (c if c < 2 else c + 1) << 28, c0, c1, k0, k1, first, low, high, Q, BITS)
    if GATE and COMPONENTS > 0:  # noqa: SIM102
        if hits > 0:
            tl.debug_barrier()
            # From L2, where the atomics are: L1 may still hold what was stored before them.
            value = _load(out, first, row, e, low, high, vector, elements, 1, 1, 0, 0, 0, 0, TE, False, ".cg")
            chosen = value
            if GATE == 2:
                chosen = _load(gradient, first, row, e, low, high, vector, elements, 1, 1, 0, 0, 0, 0, TE, False)
            tl.debug_barrier()
            _store(out, first, e, low, high, vector, _gated(value, chosen, gate, BITS))


@lru_cache(maxsize=256)
def _tables(plan: FlipPlan, device: torch.device) -> dict[str, Any]:
    """The plan as kernel arguments on a device."""
    length = max([16, *(len(c.thresholds) for c in plan.sparse)])
    length = triton.next_power_of_2(length)
    table = [[as_signed(t ^ 1 << 63) for t in c.thresholds] + [0] * (length - len(c.thresholds)) for c in plan.sparse]

    def tensor(values: list[Any], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values or [0], dtype=dtype, device=device)

    return {
        "constant": _signed32(plan.constant),
        "digits": tensor([_signed32(digit) for digit in plan.dense], torch.int32),
        "table": tensor(table, torch.int64),
        "bases": tensor([c.base for c in plan.sparse], torch.int32),
        "lengths": tensor([len(c.thresholds) for c in plan.sparse], torch.int32),
        "masks": tensor([c.mask & ((1 << plan.bits) - 1) for c in plan.sparse], torch.int64),
        "K": len(plan.dense),
        "COMPONENTS": len(plan.sparse),
        "LENGTH": length,
        "BITS": plan.bits,
    }


def _signed32(value: int) -> int:
    return value - 2**32 if value >= 2**31 else value


def launch(
    x: Tensor,
    out: Tensor,
    words: Tensor,
    key: Tensor,
    row: Tensor,
    element: Tensor,
    plan: FlipPlan,
    gate: int | None = None,
    gradient: Tensor | None = None,
    warps: int = 4,
    calls: int = 128,
) -> None:
    """Flip `x` into `out`.

    Args:
        x: [rows, elements...], of strides that `_strides` knows; viewed as integers of the plan's width.
        out: contiguous, or `x` itself.
        words: int32 view of the memory of `out`, up to a whole word.
        key, row, element: 0-d int64, on the device of `x`.
        gate: bit pattern of the zero-out threshold; None for no gate.
        gradient: contiguous; what is written where the flipped `x` passes the gate, instead of it.
        warps: of a program; calls: Philox calls for hits at a time. Both change the speed alone.
    """
    rows = x.shape[0]
    elements = x.numel() // rows
    # A tensor that starts inside a tile reaches into one tile more; where it starts only the device knows.
    tiles = triton.cdiv(elements, TILE_WORDS * 32 // plan.bits) + 1
    signed = _SIGNED[plan.bits]
    in_place = out.data_ptr() == x.data_ptr()
    strides = _strides(x)
    assert strides is not None, "copy it before"
    chosen = out if gradient is None else gradient
    _flip_kernel[(rows * tiles,)](
        x.view(signed), out.view(signed), words, chosen.view(signed), key, row, element, elements, tiles, *strides,
        -1 if gate is None else gate, **_tables(plan, x.device),
        COPY=bool(plan.constant) or not in_place or gate is not None,
        GATE=0 if gate is None else 1 if gradient is None else 2, STRIDED=not x.is_contiguous(), Q=calls, TW=TILE_WORDS,
        num_warps=warps,
    )  # fmt: skip


def _strides(x: Tensor) -> tuple[int, ...] | None:
    """(n1, n2, row stride, strides of three dimensions) of x seen as [rows, n0, n1, n2]; None if it takes more."""
    inner: list[list[int]] = []
    for size, stride in zip(x.shape[1:], x.stride()[1:], strict=True):
        if size == 1:
            continue
        if inner and inner[-1][1] == size * stride:  # neighbours that lie in memory as one dimension
            inner[-1] = [inner[-1][0] * size, stride]
        else:
            inner.append([size, stride])
    if len(inner) > 3:
        return None
    (_, s0), (n1, s1), (n2, s2) = [[1, 0]] * (3 - len(inner)) + inner
    return n1, n2, x.stride(0), s0, s1, s2


def flip_into_new(
    x: Tensor,
    key: Tensor,
    row: Tensor,
    element: Tensor,
    plan: FlipPlan,
    gate: int | None = None,
    gradient: Tensor | None = None,
) -> Tensor:
    """A flipped contiguous copy of `x`, gated, or the gated gradient: see `launch`."""
    x = x.detach()
    if _strides(x) is None:
        x = x.contiguous()
    if gradient is not None:
        gradient = gradient.detach().contiguous()
    size = x.numel() * x.element_size()
    words = torch.empty(triton.cdiv(size, 4), dtype=torch.int32, device=x.device)
    out = words.view(torch.int8)[:size].view(x.dtype).view(x.shape)
    if x.numel():
        launch(x, out, words, key, row, element, plan, gate, gradient)
    return out


def flip_cuda(
    x: Tensor,
    key: Tensor,
    row: Tensor,
    element: Tensor,
    plan: FlipPlan,
    gate: int | None = None,
    gradient: Tensor | None = None,
) -> Tensor:
    """`flip_into_new` on the device of `x`."""
    with torch.cuda.device(x.device):
        return flip_into_new(x, *(t.to(x.device) for t in (key, row, element)), plan, gate, gradient)


def flip_cuda_(x: Tensor, key: Tensor, row: Tensor, element: Tensor, plan: FlipPlan) -> None:
    """Flip contiguous `x` in place."""
    if (x.numel() * x.element_size()) % 4 or x.data_ptr() % 4:  # its words would reach beyond it
        x.copy_(flip_cuda(x, key, row, element, plan))
        return
    with torch.cuda.device(x.device):
        launch(x, x, x.view(-1).view(torch.int32), *(t.to(x.device) for t in (key, row, element)), plan)


def step_key_cuda(site_key: int, step: Tensor, tag: int) -> Tensor:
    """`streams.step_key` in one launch."""
    out = torch.empty_like(step)
    with torch.cuda.device(step.device):
        _step_key_kernel[(1,)](out, step, site_key, tag)
    return out
