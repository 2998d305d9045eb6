"""What runs on the GPU: the Triton functions that `flip_kernel` launches, and says how they work."""

# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false
# (kernels are Python that Triton compiles; a type checker sees only their surface)

from __future__ import annotations

import triton
import triton.language as tl


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
    CACHE: tl.constexpr,
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
        value = _load(x, first, row, e, low, high, vector, elements, n1, n2, s_row, s0, s1, s2, TE, STRIDED, "")
        value ^= constant.to(x.dtype.element_ty)
        if K > 0:
            value ^= _elements_of(_dense_words(digits, c0, c1, k0, k1, K, TW), BITS, TW).to(x.dtype.element_ty)
        if GATE:  # noqa: SIM102 (a constant: without a gate the rest is not compiled)
            if hits == 0:  # the value is final
                chosen = value
                if GATE == 2:
                    chosen = _load(
                        gradient, first, row, e, low, high, vector, elements, 1, 1, 0, 0, 0, 0, TE, False, ""
                    )
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
                chosen = _load(gradient, first, row, e, low, high, vector, elements, 1, 1, 0, 0, 0, 0, TE, False, "")
            tl.debug_barrier()
            _store(out, first, e, low, high, vector, _gated(value, chosen, gate, BITS))
