"""A decoder block of Llama-3.2-1B's shape through clipping, packing and the packed product; the whole model counted.

    python -m benchmarks.int2_block [--layers v_proj o_proj gate_proj up_proj down_proj] [--threads 2] [--tokens 512]
                                    [--qat] [--qat_blocks 2] [--qat_tokens 128]

Weights and inputs are random: what is measured is time and size, not quality. The search's time for a block is that of
its layers, and 16 blocks are stated as 16 times that: extrapolated, not run. Processor time stands on a shared machine.
The whole model is counted on the meta device. With --qat so many blocks, between the model's own embedding and head, go
through two steps of quantisation-aware distillation as the recipe does them. Prints a table and writes
benchmarks/int2_block.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import write
from pipeline_lib.artifacts.job import Job
from pipeline_lib.config.registry import RECIPES
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
    sizes: dict[tuple[tuple[int, ...], int], int] = {}  # layers of one shape are of one size
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
                kind = (tuple(weight.shape), functions.store.grid.bits)
                if kind not in sizes:
                    stored = functions.store.encode(weight.detach(), "weight")
                    sizes[kind] = sum(t.numel() * t.element_size() for t in stored.values())
                packed += sizes[kind] - 2 * weight.numel()
        found.append(
            {"embedding bits": bits, "16-bit MiB": round(total / 2**20, 1), "packed MiB": round(packed / 2**20, 1)}
        )
    return found


def qat(shape: dict[str, int], blocks: int, tokens: int) -> dict[str, Any]:
    """Two steps of the recipe `distill` on a model of `blocks` blocks and tied, frozen embeddings: time and memory.

    The first step makes the optimizer's state and gamma, the second is measured. One record of `tokens` tokens a step,
    bf16 products, recomputed blocks, the teacher (in bf16) beside the student.
    """
    from pipeline_lib.models import llama
    from pipeline_lib.models.memory import allocated_peak, state_account
    from pipeline_lib.training.loop import Loop

    with tempfile.TemporaryDirectory(prefix="errata-qat-") as folder:
        job = _qat_job(Path(folder), {**shape, "layers": blocks}, tokens, llama.build)
        loop = Loop(job)
        start = time.perf_counter()
        loop._optimizer_step()
        first, start, used = time.perf_counter() - start, time.perf_counter(), time.process_time()
        peak = allocated_peak(loop._optimizer_step, loop.device)
        seconds, processor = time.perf_counter() - start, time.process_time() - used
        mine = {parameter.data_ptr() for parameter in loop.model.parameters()}
        beside = sum(p.nbytes for p in loop.hooks.teacher.parameters() if p.data_ptr() not in mine)
        account = state_account(loop.model)
    return {
        "blocks": f"{blocks} of {shape['layers']}",
        "tokens": tokens,
        "trained weights": sum(p.numel() for p in loop.model.parameters() if p.requires_grad),
        "loss": round(loop.loss, 4),
        "first step s": round(first, 1),
        "step s": round(seconds, 1),
        "of processor": round(processor, 1),
        "weights MiB": round(account.weights / 2**20, 1),
        "optimizer MiB": round(account.optimizer / 2**20, 1),
        "teacher's own MiB": round(beside / 2**20, 1),
        "peak of a step MiB": round(peak / 2**20, 1),
    }


def _qat_job(root: Path, shape: dict[str, int], tokens: int, build: Any) -> Job:
    """A model and a record, both random, and the training that learns the one from the other."""
    torch.manual_seed(0)
    model: Any = build(shape)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.bfloat16().save_pretrained(root / "model")
    ids = torch.randint(shape["vocab"], (tokens + 1,)).tolist()
    record = {"id": "0", "prompt_ids": ids[:8], "completion_ids": ids[8:]}
    for name in ("teacher", "work", "out"):
        (root / name).mkdir()
    (root / "teacher" / "records.jsonl").write_text(json.dumps(record) + "\n")
    recipe = {"steps": 2, "global_batch": 1, "seq_len": tokens, "precision": "bf16", "gamma_batches": 1,
              "valid_share": 0.0, "freeze": ["model.embed_tokens.*"]}  # fmt: skip
    resolved = RECIPES.load("distill").Settings(**recipe).resolved(None).semantic()
    spec = {"model": {"family": "llama", **shape}, "transform": [{"type": "int2", "group_size": GROUP, "clip": None}],
            "recipe": resolved, "seed": 0}  # fmt: skip
    inputs = {"init": root / "model", "teacher-model": root / "model", "teacher": root / "teacher"}
    execution = {"micro_batch": 1, "activation_checkpointing": "full", "tracking": {"wandb": "off"}}
    return Job("train", "qat", "0" * 64, spec, inputs, root / "work", root / "out", execution)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    searched = ["v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    parser.add_argument("--layers", nargs="+", choices=list(SHAPES), default=searched, help="that are searched")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--qat", action="store_true", help="two training steps as well: about 6 GB, a minute or two")
    parser.add_argument("--qat_blocks", type=int, default=2)
    parser.add_argument("--qat_tokens", type=int, default=128)
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
    if arguments.qat:
        figures["qat"] = qat(LLAMA, arguments.qat_blocks, arguments.qat_tokens)
    print(figures)
    write("int2_block", figures, rows)


if __name__ == "__main__":
    main()
