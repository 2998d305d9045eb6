"""The C of `flip_native`; here so that the hash of our code covers it. `native.PARALLEL` stands before it."""

C = r"""
#include <string.h>

enum { LANES = 16, TILE_WORDS = 4096 };

/* One library for every x86-64 processor: the loader chooses the widest vectors that it has. */
#if defined(CLONES)
#define CLONED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONED
#endif
#define INLINED static inline __attribute__((always_inline))

typedef struct {
    const char *x, *gradient;          /* gradient: null, or what the gate of x' is applied to instead of x' */
    char *out;                         /* may be x */
    uint64_t key;
    int64_t first_row, rows, first_element, elements;
    int64_t gate;                      /* magnitudes from this bit pattern on become 0; -1: none do */
    const uint64_t *thresholds;        /* of all components, one after the other */
    const uint32_t *digits, *masks, *tags;
    const int32_t *bases, *lengths;
    int32_t bits, steps, components;
    uint32_t constant;
} Flip;

INLINED void philox(uint32_t c[4][LANES], uint64_t key)
{
    uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
    for (int round = 0; round < 10; round++, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u)
        for (int i = 0; i < LANES; i++) {
            uint64_t product0 = (uint64_t)c[0][i] * 0xD2511F53u, product1 = (uint64_t)c[2][i] * 0xCD9E8D57u;
            c[0][i] = (uint32_t)(product1 >> 32) ^ c[1][i] ^ k0;
            c[2][i] = (uint32_t)(product0 >> 32) ^ c[3][i] ^ k1;
            c[1][i] = (uint32_t)product1;
            c[3][i] = (uint32_t)product0;
        }
}

INLINED void calls(uint32_t c[4][LANES], uint32_t tile, uint32_t row, uint32_t first, uint32_t tag, uint64_t key)
{
    for (int i = 0; i < LANES; i++) {
        c[0][i] = tile; c[1][i] = row; c[2][i] = first + (uint32_t)i; c[3][i] = tag;
    }
    philox(c, key);
}

/* Words 4 * first to 4 * last of the tile's dense mask, into their places in `mask`. */
INLINED void dense(const Flip *f, uint32_t *mask, uint32_t tile, uint32_t row, int first, int last)
{
    for (int call = first; call < last; call += LANES) {
        uint32_t m[4][LANES] = {{0}}, r[4][LANES];
        for (int j = 0; j < f->steps; j++) {
            uint32_t digit = f->digits[j];
            calls(r, tile, row, (uint32_t)call, DENSE_TAG + (uint32_t)j, f->key);
            for (int k = 0; k < 4; k++)
                for (int i = 0; i < LANES; i++) m[k][i] = (m[k][i] & r[k][i]) | (digit & (m[k][i] | r[k][i]));
        }
        for (int i = 0; i < LANES; i++)
            for (int k = 0; k < 4; k++) mask[4 * (call + i) + k] = m[k][i];
    }
}

INLINED int above(const uint64_t *thresholds, int length, uint64_t u)
{
    int low = 0, high = length;
    while (low < high) {
        int middle = (low + high) / 2;
        if (thresholds[middle] <= u) low = middle + 1; else high = middle;
    }
    return low;
}

/* Elements low .. high - 1 of one tile of one row; returns whether the gate zeroed any. */
#define TILE(BITS, LOG2)                                                                                         \
INLINED int tile##BITS(const Flip *f, int64_t r, int64_t t)                                                  \
{                                                                                                                \
    typedef uint##BITS##_t T;                                                                                    \
    enum { TE = TILE_WORDS * 32 / BITS, PER_BLOCK = LANES * 4 * 32 / BITS };                                     \
    T scratch[TE];                                                                                               \
    uint32_t mask[TILE_WORDS], hits[4][LANES], count[4][LANES];                                                  \
    int64_t start = t * TE - f->first_element;                                                                   \
    int low = start < 0 ? (int)-start : 0, high = f->elements - start < TE ? (int)(f->elements - start) : TE;    \
    int n = high - low;                                                                                          \
    int64_t at = r * f->elements + start + low;                                                                  \
    uint32_t tile = (uint32_t)t, row = (uint32_t)(f->first_row + r);                                             \
    const T *x = (const T *)f->x + at;                                                                           \
    T *out = f->gradient ? scratch : (T *)f->out + at;                                                           \
    if (out != x) memcpy(out, x, (size_t)n * sizeof(T));                                                         \
    if (f->constant) for (int i = 0; i < n; i++) out[i] ^= (T)f->constant;                                       \
    if (f->steps) {                                                                                              \
        dense(f, mask, tile, row, low / PER_BLOCK * LANES, (high + PER_BLOCK - 1) / PER_BLOCK * LANES);          \
        const T *m = (const T *)mask + low;                                                                      \
        for (int i = 0; i < n; i++) out[i] ^= m[i];                                                              \
    }                                                                                                            \
    const uint64_t *thresholds = f->thresholds;                                                                  \
    for (int c = 0; c < f->components; thresholds += f->lengths[c++]) {                                          \
        T kept = (T)f->masks[c];                                                                                 \
        calls(count, tile, row, 0, f->tags[c], f->key);  /* call 0 tells the count, calls 1 .. 15 the first hits */ \
        uint64_t u = count[0][0] | (uint64_t)count[1][0] << 32;                                                  \
        int total = f->bases[c] + above(thresholds, f->lengths[c], u);                                           \
        for (int call = 0; 4 * (call - 1) < total; call += LANES) {                                              \
            if (call) calls(hits, tile, row, (uint32_t)call, f->tags[c], f->key);                                \
            else memcpy(hits, count, sizeof hits);                                                               \
            for (int i = call ? 0 : 1; i < LANES; i++)                                                           \
                for (int k = 0; k < 4 && 4 * (call + i - 1) + k < total; k++) {                                  \
                    uint32_t position = hits[k][i] & 0x1FFFF;                                                    \
                    uint32_t e = (position >> LOG2) - (uint32_t)low;                                             \
                    if (e < (uint32_t)n) out[e] ^= (T)(1u << (position & (BITS - 1))) & kept;                    \
                }                                                                                                \
        }                                                                                                        \
    }                                                                                                            \
    if (f->gate < 0) return 0;                                                                                   \
    const T gate = (T)f->gate, magnitude = (T)~(T)0 >> 1;                                                        \
    const T *source = f->gradient ? (const T *)f->gradient + at : out;                                           \
    T *target = (T *)f->out + at, dropped = 0;                                                                   \
    for (int i = 0; i < n; i++) {                                                                                \
        T keep = (T)-((out[i] & magnitude) < gate);                                                              \
        target[i] = source[i] & keep;                                                                            \
        dropped |= (T)~keep;                                                                                     \
    }                                                                                                            \
    return dropped != 0;                                                                                         \
}
TILE(8, 3)
TILE(16, 4)
TILE(32, 5)

CLONED int errata_flip_part(const Flip *f, int64_t begin, int64_t end)
{
    int64_t per_tile = TILE_WORDS * 32 / f->bits, first = f->first_element / per_tile;
    int64_t tiles = (f->first_element + f->elements - 1) / per_tile - first + 1;
    int dropped = 0;
    for (int64_t i = begin; i < end; i++) {
        int64_t r = i / tiles, t = first + i % tiles;
        dropped |= f->bits == 8 ? tile8(f, r, t) : f->bits == 16 ? tile16(f, r, t) : tile32(f, r, t);
    }
    return dropped;
}

typedef struct { const Flip *f; int dropped; } Work;

static void part(void *data, int64_t begin, int64_t end)
{
    Work *work = data;
    if (errata_flip_part(work->f, begin, end)) __atomic_store_n(&work->dropped, 1, __ATOMIC_RELAXED);
}

/* Tiles 0 .. count - 1 of all rows on some threads; returns whether the gate zeroed any element. */
int errata_flip(const Flip *f, int64_t count, int threads)
{
    Work work = {f, 0};
    in_parallel(part, &work, count, threads);
    return work.dropped;
}
"""
