"""C kernels for the CPU: compiled once by the machine's own compiler into the user's cache, called through ctypes.

They run on torch's own threads. Threads of a kernel's own would fight with those, which go on spinning for a while
after each of torch's operations: measured with a step of `nano` on 2 cores, that can double the step's time.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

PARALLEL = r"""
#include <stdint.h>

/* torch's threads are GNU OpenMP's, or of something that imitates it; weak, for where it is neither. */
extern void GOMP_parallel(void (*work)(void *), void *data, unsigned threads, unsigned flags) __attribute__((weak));
extern int omp_get_thread_num(void) __attribute__((weak));
extern int omp_get_num_threads(void) __attribute__((weak));

typedef struct { void (*work)(void *data, int64_t begin, int64_t end); void *data; int64_t count; } Shares;

static void share(void *of)
{
    Shares *s = of;
    int64_t i = omp_get_thread_num(), n = omp_get_num_threads();
    s->work(s->data, s->count * i / n, s->count * (i + 1) / n);
}

/* work(data, begin, end) over 0 .. count in as many parts as threads; all at once where there is no OpenMP. */
static void in_parallel(void (*work)(void *, int64_t, int64_t), void *data, int64_t count, int threads)
{
    Shares shares = {work, data, count};
    if (threads > count) threads = (int)count;
    if (threads < 2 || !GOMP_parallel || !omp_get_thread_num || !omp_get_num_threads) work(data, 0, count);
    else GOMP_parallel(share, &shares, (unsigned)threads, 0);
}
"""


def load(name: str, source: str, *flags: tuple[str, ...]) -> ctypes.CDLL:
    """The library of a C source, after `PARALLEL`.

    Args:
        flags: of the compiler, beside -O3; the first that it takes count. They may name this very processor.

    Raises:
        OSError: no compiler, or no folder to write to.
        SubprocessError: it does not compile.
    """
    return ctypes.CDLL(str(built(name, source, *flags)))


def built(name: str, source: str, *flags: tuple[str, ...]) -> Path:
    """The file of the library, compiled if it is not in the cache yet; raises as `load` does."""
    source = PARALLEL + source
    compiler = shlex.split(os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), ""))
    what = "\0".join((source, *compiler, repr(flags), platform.system(), platform.machine(), _processor()))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "errata"
    path = cache / f"{name}-{hashlib.sha256(what.encode()).hexdigest()[:16]}.so"
    if path.is_file():
        return path
    if not compiler:
        raise OSError("no C compiler was found")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        code, made = Path(folder) / f"{name}.c", Path(folder) / f"{name}.so"
        code.write_text(source)
        said = ""
        for chosen in flags or ((),):
            command = [*compiler, "-O3", "-std=gnu11", "-shared", "-fPIC", *chosen, str(code), "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                return made.replace(path)  # by rename: another process may be at it, too
            said = done.stderr[-500:]
    raise subprocess.SubprocessError(f"{shlex.join(compiler)} failed: {said}")


def _processor() -> str:
    """What tells apart the processors that share a home directory."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
