"""Where the whole process group is killed: name → (audit event, pattern, which match, artifacts to remake first).

The third part of a name is what dies half-way. Only the stages named last are made again; what is before them is
copied from a finished pipeline, which keeps a kill cheap.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Point:
    """One place to die.

    Attributes:
        event: a Python audit event (`open`, `os.rename`).
        match: regular expression on the event's arguments.
        nth: die at this match.
        remake: stages whose artifacts are deleted first, so that they run.
    """

    event: str
    match: str
    nth: int
    remake: tuple[str, ...]


DATA = ("dataset", "tokenizer", "tokens", "train", "convert", "evaluate", "result", "sweep")
TRAIN = DATA[3:]
CONVERT = DATA[4:]
EVALUATE = DATA[5:]

POINTS: dict[str, Point] = {
    "download: first byte": Point("open", r"work/dataset--[^ ]*\.parquet", 1, DATA),
    "download: publish": Point("os.rename", r"work/dataset--[^ ]*/out [^ ]*store/dataset", 1, DATA),
    "tokenise: tokenizer written": Point("open", r"work/tokenizer--[^ ]*tokenizer_config.json", 1, DATA),
    "tokenise: tokens sealed": Point("open", r"work/tokens--[^ ]*out/tokens.json", 1, DATA),
    "train: first log line": Point("open", r"work/train--[^ ]*metrics.jsonl", 2, TRAIN),
    "train: weights written": Point("open", r"work/train--[^ ]*out/train.json", 1, TRAIN),
    "checkpoint: shard": Point("open", r"work/train--[^ ]*checkpoints/[^ ]*distcp", 2, TRAIN),
    "checkpoint: seal": Point("open", r"work/train--[^ ]*checkpoints/[^ ]*seal", 2, TRAIN),
    "rename done, no manifest: train": Point("open", r"store/train/[^ ]*/\.manifest\.json\.[0-9]+\.tmp", 1, TRAIN),
    "rename done, no manifest: dataset": Point("open", r"store/dataset/[^ ]*/\.manifest\.json\.[0-9]+\.tmp", 1, DATA),
    "convert: config": Point("open", r"work/convert--[^ ]*config.json", 1, CONVERT),
    "convert: publish": Point("os.rename", r"work/convert--[^ ]*/out [^ ]*store/convert", 2, CONVERT),
    "evaluate: result": Point("open", r"work/evaluate--[^ ]*out/\.result.json", 1, EVALUATE),
    "evaluate: second cell of a sweep": Point(
        "os.rename", r"work/evaluate--[^ ]*/out [^ ]*store/evaluate", 4, EVALUATE
    ),
    "collect: CSV": Point("open", r"work/sweep--[^ ]*table.csv", 1, EVALUATE),
    "collect: readable copy": Point("open", r"results/sweeps/\.p\.csv", 1, ("result", "sweep")),
}
IN_CI = ("download: publish", "checkpoint: seal", "rename done, no manifest: train", "evaluate: second cell of a sweep")
