"""Optical products in training on a GPU: our step against a plain-torch formulation and the untransformed step.

    python -m benchmarks.optical_gpu [--models 60m] [--batch 8] [--rounds 7] [--skip-kernel]

Training steps of models of config.yaml in bf16 on sequences of 2,048 tokens, eager, with the transform's defaults;
"plain torch" is that of benchmarks.optical_step. Peak memory is torch's own account of a step. Then, for the shapes of
one layer, the forward product by size of the kernel's tile, which changes no value: what its constants are chosen by.
Rounds are interleaved; figures are medians. Prints tables and writes benchmarks/optical_gpu.json. Without a GPU it
refuses.

Goals: at most half the time and half the peak memory of plain torch, at most twice the untransformed step.
"""

from __future__ import annotations

import argparse
import gc
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.bitflip_gpu import SEQUENCE, interleaved, sizes_of_config
from benchmarks.optical_step import OURS, PLAIN, RIVAL, plain_product
from benchmarks.report import table, write
from pipeline_lib.config.errors import UserError
from pipeline_lib.transforms.base import Draw

TILES = [(bm, bn, bk) for bm in (64, 128) for bn in (64, 128, 256) for bk in (32, 64)]
GOALS = {RIVAL: {"time": 0.5, "memory": 0.5}, PLAIN: {"time": 2.0}}


def need_a_gpu() -> None:
    """Make sure that there is something to measure.

    Raises:
        UserError: there is not.
    """
    if not torch.cuda.is_available():
        raise UserError("this benchmark measures a GPU, and torch sees none", fix="run it on a machine with CUDA")


def trainer(contestant: str, name: str, batch: int) -> Callable[[], None]:
    """A function that does the next training step of a model of config.yaml."""
    from pipeline_lib.models import llama
    from pipeline_lib.transforms.apply import apply
    from pipeline_lib.transforms.optical import compute

    settings = sizes_of_config(name)
    torch.manual_seed(0)
    with torch.device("cuda"):
        model: Any = llama.build(settings)
        model.to(torch.bfloat16).train()
    applied = apply(model, [] if contestant == PLAIN else [{"type": "optical"}], seed=0, global_batch=batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    tokens = torch.randint(0, settings["vocab"], (batch, SEQUENCE), device="cuda")
    own, done = compute.product, [0]

    def step() -> None:
        compute.product = plain_product if contestant == RIVAL else own
        try:
            applied.context.begin(done[0], 0)
            loss = model(input_ids=tokens, labels=tokens).loss
        finally:
            compute.product = own
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        applied.settle()
        done[0] += 1

    return step


def steps(name: str, batch: int, rounds: int) -> list[dict[str, Any]]:
    """A training step of a model, three ways."""
    peaks: dict[str, int] = {}
    for contestant in (PLAIN, OURS, RIVAL):
        step = trainer(contestant, name, batch)
        step()
        torch.cuda.reset_peak_memory_stats()
        step()
        peaks[contestant] = torch.cuda.max_memory_allocated()
        del step
        gc.collect()
        torch.cuda.empty_cache()
    times = interleaved({contestant: trainer(contestant, name, batch) for contestant in (PLAIN, OURS, RIVAL)}, rounds)
    gc.collect()
    torch.cuda.empty_cache()
    return rows(name, times, peaks)


def rows(name: str, times: dict[str, list[float]], peaks: dict[str, int]) -> list[dict[str, Any]]:
    """Lines of the table; ratios are ours over the line's, round by round."""
    made = []
    for contestant, own in times.items():
        ratio = statistics.median(a / b for a, b in zip(times[OURS], own, strict=True))
        found = {"time": ratio, "memory": peaks[OURS] / peaks[contestant]}
        goals = GOALS.get(contestant, {})
        said = [f"{what} {most:g}: {'met' if found[what] <= most else 'MISSED'}" for what, most in goals.items()]
        made.append(
            {
                "model": name,
                "step": contestant,
                "ms": round(statistics.median(own), 2),
                "peak MiB": round(peaks[contestant] / 2**20),
                "time, ours / it": round(ratio, 3),
                "memory, ours / it": round(found["memory"], 3),
                "goal": ", ".join(said) or None,
            }
        )
    return made


def tiles(rounds: int) -> list[dict[str, Any]]:
    """Milliseconds of one forward product of 16,384 rows by size of the tile."""
    from pipeline_lib.transforms.optical import kernel

    rows_, features, outputs = 8 * SEQUENCE, 1536, 5376
    left: Tensor = torch.randn(8, rows_ // 8, features, device="cuda", dtype=torch.bfloat16)
    right = torch.randn(outputs, features, device="cuda", dtype=torch.bfloat16) / 50
    ranges = torch.tensor([[-4.0, 4.0], [-0.1, 0.1], [-4.0, 4.0]], device="cuda")
    knobs = torch.tensor([255.0, 255.0, 0.0], device="cuda")
    draw = Draw(*(torch.tensor(value, device="cuda") for value in (5, 0, 0)), strides=(1,))

    def call(blocks: dict[str, int]) -> Callable[[], Any]:
        return lambda: kernel.launch(
            left, right, ranges, knobs, draw,
            linear=True, lut_min=0.02, gate=False, observe=True, eased=False, blocks=blocks,
        )  # fmt: skip

    calls: dict[str, Callable[[], Any]] = {"exact": lambda: left @ right.t()}
    calls |= {f"{bm} × {bn} × {bk}": call({"BM": bm, "BN": bn, "BK": bk}) for bm, bn, bk in TILES}
    times = interleaved({tile: call for tile, call in calls.items() if fits(call)}, rounds)
    return [
        {"tile": tile, "ms": round(statistics.median(times[tile]), 4) if tile in times else "does not fit"}
        for tile in calls
    ]


def fits(call: Callable[[], Any]) -> bool:
    """Whether a kernel's tile fits into this GPU's shared memory."""
    from triton.runtime.errors import OutOfResources

    try:
        call()
    except OutOfResources:
        return False
    return True


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["60m"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--skip-kernel", action="store_true", help="leave the sizes of tiles out")
    arguments = parser.parse_args()
    try:
        need_a_gpu()
    except UserError as error:
        raise SystemExit(str(error)) from None
    found = [row for name in arguments.models for row in steps(name, arguments.batch, arguments.rounds)]
    others = {} if arguments.skip_kernel else {"tiles": tiles(arguments.rounds)}
    for name, other in others.items():
        print(f"\n{name}\n{table(other)}")
    settings = {**vars(arguments), "gpu": torch.cuda.get_device_name()}
    write("optical_gpu", {"settings": settings, **others}, found)


if __name__ == "__main__":
    main()
