"""The product of a few rows with a 2-bit weight on a CPU: a C loop, compiled for the machine it runs on.

Packed weights are a sixteenth of fp32 ones, so that the loop is bound by arithmetic where the plain product is bound
by memory. It needs a C compiler (`cc`, or $CC) at first use, as torch.compile and Triton do; without one the decoded
weight is multiplied instead, which is slow, and that is said once.
"""

from __future__ import annotations

import ctypes
import subprocess
import warnings
from functools import lru_cache

import torch
from torch import Tensor

from pipeline_lib.numerics import native

_LEAST_PER_THREAD = 2**20  # weights; below it a thread costs more than it brings

SOURCE = r"""
#include <string.h>
typedef float f16 __attribute__((vector_size(64)));
typedef int32_t i16 __attribute__((vector_size(64)));
typedef uint32_t u16 __attribute__((vector_size(64)));

static inline float sum(f16 v) {
    float s = 0;
    for (int i = 0; i < 16; i++) s += v[i];
    return s;
}

typedef struct {
    const float *x, *sums;
    const uint32_t *codes;
    const float *scale;
    const uint8_t *zero;
    float *y;
    int64_t m, n_all, k, g;
} Product;

/* y[m, n] = sum_k x[m, k] (q[n, k] - z[n, k / g]) s[n, k / g], for n in [4 begin, 4 end).
   A word holds 16 codes, the first in the lowest bits. `sums`: of x over each group, [m, groups]. */
static void rows_by_4(void *data, int64_t begin, int64_t end) {
    const Product *p = data;
    const float *x = p->x, *sums = p->sums, *scale = p->scale;
    const uint32_t *codes = p->codes;
    const uint8_t *zero = p->zero;
    float *y = p->y;
    const int64_t m = p->m, n_all = p->n_all, k = p->k, g = p->g;
    const int64_t first = 4 * begin, last = 4 * end < n_all ? 4 * end : n_all;
    const i16 shift = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
    const int64_t words = k / 16, per = g / 16, groups = (words + per - 1) / per, zeros = (groups + 3) / 4;
    for (int64_t n = first; n < last; n += 4) {
        const int rows = last - n < 4 ? (int)(last - n) : 4;
        const uint32_t *c[4];
        for (int r = 0; r < 4; r++) c[r] = codes + (n + (r < rows ? r : 0)) * words;
        for (int64_t i = 0; i < m; i++) {
            f16 total[4] = {{0}};
            float less[4] = {0};
            for (int64_t j = 0; j < groups; j++) {
                f16 part[4] = {{0}};
                const int64_t end = (j + 1) * per < words ? (j + 1) * per : words;
                for (int64_t w = j * per; w < end; w++) {
                    f16 v;
                    memcpy(&v, x + i * k + 16 * w, 64);
                    for (int r = 0; r < 4; r++) {
                        i16 q = (i16)(((u16){0} + c[r][w]) >> (u16)shift) & 3;
                        part[r] += __builtin_convertvector(q, f16) * v;
                    }
                }
                for (int r = 0; r < rows; r++) {
                    const float s = scale[(n + r) * groups + j];
                    const int z = zero[(n + r) * zeros + j / 4] >> (2 * (j % 4)) & 3;
                    total[r] += part[r] * s;
                    less[r] += s * z * sums[i * groups + j];
                }
            }
            for (int r = 0; r < rows; r++) y[i * n_all + n + r] = sum(total[r]) - less[r];
        }
    }
}

void product(Product *p, int threads) { in_parallel(rows_by_4, p, (p->n_all + 3) / 4, threads); }
"""


class _Product(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "sums", "codes", "scale", "zero", "y")),
        *((name, ctypes.c_int64) for name in ("m", "n_all", "k", "g")),
    )


@lru_cache(maxsize=1)
def available() -> bool:
    """Whether the loop could be compiled here; if not, why is said, once."""
    try:
        _library()
    except (OSError, subprocess.SubprocessError) as error:
        warnings.warn(f"no compiled loop for packed weights, so they are decoded at each use: {error}", stacklevel=2)
        return False
    return True


def packed_linear(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, group_size: int
) -> Tensor:
    """See `packed_linear.packed_linear`; 2 bits, rows and groups of whole words, CPU tensors."""
    count, features = codes.shape[0], x.shape[-1]
    size = min(group_size, features)
    x_MK = x.detach().reshape(-1, features).float().contiguous()
    sums = torch.nn.functional.pad(x_MK, (0, -features % size)).unflatten(1, (-1, size)).sum(-1).contiguous()
    codes, scale, zero = codes.contiguous(), scale.float().contiguous(), zero.contiguous()
    y_MN = torch.empty(len(x_MK), count)
    pointers = (tensor.data_ptr() for tensor in (x_MK, sums, codes, scale, zero, y_MN))
    product = _Product(*pointers, len(x_MK), count, features, size)
    threads = max(1, min(torch.get_num_threads(), count * features // _LEAST_PER_THREAD))
    _library().product(ctypes.byref(product), threads)
    y_MN = y_MN if bias is None else y_MN + bias.detach().float()
    return y_MN.to(x.dtype).view(*x.shape[:-1], count)


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    return native.load("packed", SOURCE, ("-march=native",))
