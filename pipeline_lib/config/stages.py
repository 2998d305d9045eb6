"""The stages of the DAG and their versions (DESIGN §2, §4)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """A node type of the DAG.

    Attributes:
        version: raised when the stage's code changes what it makes; enters every fingerprint.
        network: the stage fetches from outside; all others run offline.
    """

    version: int
    network: bool = False


STAGES: dict[str, Stage] = {
    "assets": Stage(1, network=True),
    "dataset": Stage(1, network=True),
    "tokenizer": Stage(1),
    "tokens": Stage(1),
    "teacher": Stage(1),
    "clip": Stage(1),
    "timing": Stage(1),
    "score": Stage(1),
    "train": Stage(3),
    "convert": Stage(2),
    "evaluate": Stage(3),
    "result": Stage(1),
    "sweep": Stage(1),
    "table": Stage(2),
    "report": Stage(1),
    "publish": Stage(1, network=True),
}
