"""A decoder block of Llama-3.2-1B's shape through clipping, packing and the packed product; the whole model counted.

    python -m benchmarks.int2_block [--layers v_proj o_proj gate_proj up_proj down_proj] [--threads 2] [--tokens 512]

Weights and inputs are random: what is measured is time and size, not quality. The search's time for a block is that of
its layers, and 16 blocks are stated as 16 times that: extrapolated, not run. Processor time stands on a shared machine.
The whole model is counted on the meta device. Prints a table and writes benchmarks/int2_block.json.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

from benchmarks.report import write
from pipeline_lib.numerics.grids import GRIDS, from_groups, to_groups
from pipeline_lib.numerics.packed_linear import packed_linear, reference
from pipeline_lib.numerics.packing import pack, unpack
from pipeline_lib.transforms.int2.clip import search
from pipeline_lib.transforms.int2.settings import Clip, Settings

BLOCKS, GROUP = 16, 128
LLAMA = {"dim": 2048, "layers": BLOCKS, "heads": 32, "kv_heads": 8, "ffn": 8192, "vocab": 128256, "max_seq_len": 1024}
SHAPES = {
    "q_proj": (2048, 2048), "k_proj": (512, 2048), "v_proj": (512, 2048), "o_proj": (2048, 2048),
    "gate_proj": (8192, 2048), "up_proj": (8192, 2048), "down_proj": (2048, 8192),
}  # fmt: skip


def layer(name: str, searched: bool, tokens: int) -> dict[str, Any]:
    """Search (where the transform searches), quantise, pack, multiply; times in seconds, sizes in bytes."""
    out, features = SHAPES[name]
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out, features, generator=generator) * 0.02
    inputs = torch.randn(tokens, features, generator=generator)
    settings, grid = Settings(group_size=GROUP, clip=Clip()), GRIDS["int2-asym"]
    assert settings.clip is not None
    seconds, processor, figures = None, None, {}
    grouped = to_groups(weight, GROUP)
    if searched:
        start, used = time.perf_counter(), time.process_time()
        found, figures = search(weight, inputs, settings, settings.clip)
        seconds, processor = round(time.perf_counter() - start, 2), round(time.process_time() - used, 2)
        grouped = grouped.clamp(found["minimum"][..., None], found["maximum"][..., None])
    start = time.perf_counter()
    parameters = grid.parameters(grouped.amin(-1), grouped.amax(-1), torch.float16)
    codes = from_groups(grid.codes(grouped, parameters), features)
    stored = (pack(codes, 2), parameters["scale"].half(), pack(parameters["zero"], 2))
    packed_in = round(time.perf_counter() - start, 2)
    if not torch.equal(unpack(stored[0], 2, features), codes):
        raise RuntimeError("packing lost codes")
    expected = reference(inputs[:1], *stored, None, 2, GROUP)
    error = (packed_linear(inputs[:1], *stored, None, 2, GROUP) - expected).abs().max() / expected.abs().max()
    size = sum(tensor.numel() * tensor.element_size() for tensor in stored)
    return {
        "layer": name,
        "out × in": f"{out} × {features}",
        "search s": seconds,
        "of processor": processor,
        "output error after / before": round(figures["output_error_after"] / figures["output_error_before"], 3)
        if figures
        else None,
        "pack s": packed_in,
        "MiB": round(size / 2**20, 3),
        "bits a weight": round(8 * size / (out * features), 4),
        "product's error": f"{float(error):.1e}",
    }


def whole_model() -> list[dict[str, Any]]:
    """Bytes of the whole model on the meta device: 16-bit, and packed with the embedding at 16, 8 and 4 bits."""
    from pipeline_lib.models import llama
    from pipeline_lib.transforms.apply import apply
    from pipeline_lib.transforms.int2.store import GroupedStore

    found = []
    for bits in (16, 8, 4):
        with torch.device("meta"):
            model: Any = llama.build(LLAMA)
        model.config.tie_word_embeddings = True
        model.tie_weights()
        entry = {"type": "int2", "group_size": GROUP, "embedding": bits, "head": bits}
        applied = apply(model, [entry], seed=0)
        total = 2 * sum(parameter.numel() for parameter in model.parameters())
        packed, seen = total, set()
        for at, functions in applied.at:
            weight: Any = at.module.weight
            if id(weight) not in seen and isinstance(functions.store, GroupedStore):
                seen.add(id(weight))
                stored = functions.store.encode(weight.detach(), "weight")
                packed += sum(t.numel() * t.element_size() for t in stored.values()) - 2 * weight.numel()
        found.append(
            {"embedding bits": bits, "16-bit MiB": round(total / 2**20, 1), "packed MiB": round(packed / 2**20, 1)}
        )
    return found


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    searched = ["v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    parser.add_argument("--layers", nargs="+", choices=list(SHAPES), default=searched, help="that are searched")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = whole_model()
    rows = [layer(name, name in arguments.layers, arguments.tokens) for name in SHAPES]
    block, used = (sum(row[name] or 0 for row in rows) for name in ("search s", "of processor"))
    figures = {
        "settings": vars(arguments),
        "model": LLAMA,
        "whole_model": model,
        "search_seconds_a_block": round(block, 1),
        "search_seconds_of_16_blocks_extrapolated": round(BLOCKS * block, 1),
        "processor_seconds_of_16_blocks_extrapolated": round(BLOCKS * used, 1),
    }
    print(figures)
    write("int2_block", figures, rows)


if __name__ == "__main__":
    main()
