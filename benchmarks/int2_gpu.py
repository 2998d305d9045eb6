"""The packed 2-bit product and a packed decoder on a GPU: against bf16, with gemlite beside them, in one process.

    python -m benchmarks.int2_gpu [--rows 1 2 4 8 16 32 64 512] [--rounds 20] [--without-gemlite]

Products: Llama-3.2-1B's shapes, groups of 128, bf16 inputs. Each variant is one CUDA graph of products with different
copies of its weight, together more than twice the L2 cache, so that every weight comes from memory. Decoding: a model
of that shape with random weights, one sequence, a static KV cache, one CUDA graph a token, bf16 and packed. A round
replays every graph once; ratios compare neighbours in time. Goals: 2.5 times bf16 at one row, never slower up to 64
rows, decoding faster. Prints a table and whether the goals are met, and writes benchmarks/int2_gpu.json. Needs a GPU,
and `pip install gemlite` for the rival.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.int2_block import GROUP, LLAMA, SHAPES
from benchmarks.report import write
from pipeline_lib.numerics.packed_linear import packed_linear, reference
from pipeline_lib.numerics.packing import pack

GOAL_ONE_ROW, NEVER_SLOWER_TO = 2.5, 64
PROMPT = 64  # tokens in the cache before decoding is timed
WARM_UPS = 3, 2  # calls before a capture; rounds that are not counted
Products = list[Callable[[], Tensor]]


def products(out: int, features: int, rows: int, copies_bytes: int, device: str, gemlite: bool) -> dict[str, Products]:
    """One function for each copy of each variant's weight; all of a variant give the same.

    Raises:
        RuntimeError: a variant computes something else than the definition.
    """
    groups = features // GROUP
    codes = torch.randint(0, 4, (out, features), dtype=torch.uint8, device=device)
    scale = (torch.rand(out, groups, device=device) + 0.5).half() * 0.02
    zeros = torch.randint(0, 4, (out, groups), dtype=torch.uint8, device=device)
    stored = (pack(codes, 2), scale, pack(zeros, 2))
    x = torch.randn(rows, features, device=device).bfloat16()
    weight = reference(torch.eye(features, device=device), *stored, None, 2, GROUP).T.bfloat16()

    def copies(size: int) -> range:
        return range(max(1, -(-copies_bytes // size)))

    made: dict[str, Products] = {
        "bf16": [lambda w=w: F.linear(x, w) for w in (weight.clone() for _ in copies(2 * out * features))],
        "packed": [
            lambda c=c, s=s, z=z: packed_linear(x, c, s, z, None, 2, GROUP)
            for c, s, z in ([t.clone() for t in stored] for _ in copies(out * features // 4))
        ],
    }
    if gemlite:
        made["gemlite"] = [gemlite_product(codes, scale, zeros, x) for _ in copies(out * features // 4)]
    expected = reference(x.double(), *stored, None, 2, GROUP)
    for name, functions in made.items():
        error = (functions[0]().double() - expected).abs().max() / expected.abs().max()
        if error > 0.02:
            raise RuntimeError(f"{name} is off by {float(error):.2g} of the largest output; its speed means nothing")
    return made


def gemlite_product(codes: Tensor, scale: Tensor, zeros: Tensor, x: Tensor) -> Callable[[], Tensor]:
    """The rival's layer on the same codes: w = (q - z) s."""
    from gemlite.core import DType, GemLiteLinear  # type: ignore[import-not-found]

    out, features = codes.shape
    layer = GemLiteLinear(
        2,
        group_size=GROUP,
        in_features=features,
        out_features=out,
        input_dtype=DType.BF16,
        output_dtype=DType.BF16,
    )
    layer.pack(codes.clone(), scale.bfloat16().view(-1, 1), zeros.bfloat16().view(-1, 1), None)
    return lambda: layer(x)


def captured(functions: list[Callable[[], Any]]) -> Callable[[], None]:
    """A CUDA graph of all functions, one after the other."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        for _ in range(WARM_UPS[0]):
            for function in functions:
                function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        for function in functions:
            function()
    return graph.replay


def timed(replays: dict[str, tuple[Callable[[], None], int]], rounds: int) -> dict[str, list[float]]:
    """Microseconds a function of each round: {name: (replay, functions in it)} in turn."""
    found: dict[str, list[float]] = {name: [] for name in replays}
    for number in range(WARM_UPS[1] + rounds):
        for name, (replay, count) in replays.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            replay()
            end.record()
            end.synchronize()
            if number >= WARM_UPS[1]:
                found[name].append(start.elapsed_time(end) * 1e3 / count)
    return found


def row(what: str, rows: int, micros: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, and the speed of each variant as a multiple of bf16 in the same round."""
    made: dict[str, Any] = {"what": what, "rows": rows}
    made |= {f"{name} µs": round(statistics.median(found), 2) for name, found in micros.items()}
    for name in ("packed", "gemlite"):
        ratios = [a / b for a, b in zip(micros["bf16"], micros.get(name, []), strict=False)]
        made[f"{name} × bf16"] = round(statistics.median(ratios), 2) if ratios else None
    made.setdefault("gemlite µs", None)
    return made


def goals(rows: list[dict[str, Any]]) -> dict[str, bool]:
    """Which goals these rows meet; those of rows that were not measured are not met."""
    linear = [entry for entry in rows if entry["what"] != "decode"]
    one = [entry["packed × bf16"] for entry in linear if entry["rows"] == 1]
    few = [entry["packed × bf16"] for entry in linear if entry["rows"] <= NEVER_SLOWER_TO]
    decode = [entry["packed × bf16"] for entry in rows if entry["what"] == "decode"]
    return {
        f"at least {GOAL_ONE_ROW} × bf16 at one row": bool(one) and min(one) >= GOAL_ONE_ROW,
        f"never slower than bf16 up to {NEVER_SLOWER_TO} rows": bool(few) and min(few) >= 1,
        "decoding faster than bf16": bool(decode) and min(decode) > 1,
    }


def decoders(device: str) -> dict[str, Callable[[], Any]]:
    """For bf16 and packed weights, a function that decodes one token of a 1B-shaped model with a static cache."""
    from transformers import StaticCache

    from pipeline_lib.models import llama
    from pipeline_lib.transforms.apply import apply
    from pipeline_lib.transforms.packed import drop_latent, pack

    found = {}
    for name in ("bf16", "packed"):
        torch.manual_seed(0)
        model: Any = llama.build(LLAMA)
        model = model.to(device, torch.bfloat16).eval()
        if name == "packed":
            applied = apply(model, [{"type": "int2", "group_size": GROUP}], seed=0)
            pack(applied)
            drop_latent(applied)
            applied.context.begin(0, 0)
        cache = StaticCache(config=model.config, max_cache_len=LLAMA["max_seq_len"])
        with torch.no_grad():
            model(torch.arange(PROMPT, device=device)[None], past_key_values=cache, use_cache=True)
        token = torch.ones(1, 1, dtype=torch.int64, device=device)
        place = torch.full((1, 1), PROMPT, device=device)  # its own counter advances with each replay, up to the room
        found[name] = lambda model=model, cache=cache, token=token, place=place: model(
            token, past_key_values=cache, use_cache=True, position_ids=place
        )
    return found


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 512])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--without-gemlite", action="store_true")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("int2_gpu measures kernels on a GPU, and this machine has none; on a CPU: benchmarks.int2_cpu")
    room = LLAMA["max_seq_len"] - PROMPT - sum(WARM_UPS)
    if not 1 <= arguments.rounds <= room:
        raise SystemExit(f"--rounds {arguments.rounds}: each decodes a token; 1 to {room} fit into the cache")
    if not arguments.without_gemlite and importlib.util.find_spec("gemlite") is None:
        raise SystemExit("the rival is not installed: `pip install gemlite`, or give --without-gemlite")
    cache = 2 * torch.cuda.get_device_properties(0).L2_cache_size
    rows = []
    for shape in dict.fromkeys(SHAPES.values()):
        for count in arguments.rows:
            made = products(*shape, count, cache, "cuda", not arguments.without_gemlite)
            replays = {name: (captured(list(functions)), len(functions)) for name, functions in made.items()}
            rows.append(row(f"{shape[0]} × {shape[1]}", count, timed(replays, arguments.rounds)))
    replays = {name: (captured([decode]), 1) for name, decode in decoders("cuda").items()}
    rows.append(row("decode", 1, timed(replays, arguments.rounds)))
    met = goals(rows)
    write("int2_gpu", {"settings": vars(arguments), "device": torch.cuda.get_device_name(), "goals": met}, rows)
    print("\n".join(f"{'met' if fine else 'MISSED'}: {goal}" for goal, fine in met.items()))


if __name__ == "__main__":
    main()
