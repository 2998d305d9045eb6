"""Budgets that are not counted in steps, and the reference times that they are counted in."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, model_validator

from pipeline_lib.config.base import Settings
from pipeline_lib.training.work import Price

Positive = Annotated[float, Field(gt=0)]

# Seconds of an RTX 3090 for a forward and backward pass of 128 sequences of 128 tokens through 1 … 16 layers of the
# crammed BERT, its share of an optimizer step of 1,536 sequences included. From JeanKaddour/NoTrainNoGain; the seventh
# is published as 0.01052, a tenth of what its neighbours say.
RTX3090 = (
    0.02521, 0.03837, 0.05177, 0.06508, 0.07847, 0.09188, 0.1052, 0.1186, 0.1319, 0.1454, 0.1589, 0.1722, 0.1857,
    0.1988, 0.212, 0.2253,
)  # fmt: skip
RTX3090_FORWARD = 0.09285
"""Of a forward pass alone, through 16 layers; for fewer, the same share of the pass with its backward pass."""
RTX3090_SEQUENCES, RTX3090_BATCH = 128, 1536
CRAMMED = {"dim": 768, "layers": 16, "ffn": 3072}


class Table(Settings):
    """Seconds a sequence, as stage `timing` measures them: kind of pass → layers → seconds."""

    seconds: dict[str, dict[int, Positive]] = Field(
        description="{train, forward, hessian}: {layers: seconds a sequence}"
    )

    def price(self, kind: str, layers: int, sequences: int) -> float:
        """Seconds.

        Raises:
            ValueError: that pass was not measured.
        """
        try:
            return self.seconds[kind][layers] * sequences
        except KeyError:
            raise ValueError(f"the reference has no time for a {kind} pass through {layers} layers") from None


def _as_reference(given: Any) -> Any:
    """A timing file becomes the numbers in it: where it lies is no part of what is trained."""
    if not isinstance(given, str) or not given.endswith(".json"):
        return given
    try:
        return {"seconds": json.loads(Path(given).read_text())["provenance"]["seconds"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{given} is no timing.json of the stage `timing` ({type(error).__name__}: {error})") from None


class Budget(Settings):
    """What a training may spend; exactly one of rst_hours, flops, wall_hours."""

    rst_hours: Positive | None = Field(None, description="hours of reference system time (RST)")
    flops: Positive | None = Field(None, description="floating-point operations of matrix products")
    wall_hours: Positive | None = Field(
        None, description="hours of this machine's clock: the one budget whose result another run does not repeat"
    )
    reference: Annotated[Table | str, BeforeValidator(_as_reference)] = Field(
        "rtx3090",
        description="whose time rst_hours are: rtx3090 (published, of the crammed BERT), flops (FLOPs at the rate of "
        "the rtx3090 there; for any model), measured (this machine's, by stage timing), or the path of a timing.json",
    )

    @model_validator(mode="after")
    def _one(self) -> Self:
        given = [name for name in ("rst_hours", "flops", "wall_hours") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"a budget is exactly one of rst_hours, flops and wall_hours, and not {given or 'none'}")
        if isinstance(self.reference, str) and self.reference not in ("rtx3090", "flops", "measured"):
            raise ValueError(
                f"reference {self.reference!r} is none of rtx3090, flops, measured and the path of a .json"
            )
        if self.rst_hours is None and self.reference != "rtx3090":
            raise ValueError("`reference` belongs to a budget in rst_hours: remove it")
        return self

    @property
    def measured(self) -> bool:
        """Whether it needs this machine's times."""
        return self.reference == "measured"

    def expected_steps(self, sequences: int, flops_a_sequence: float) -> int | None:
        """Steps of whole batches of `sequences` that it pays for, roughly; None where only the machine knows."""
        if self.flops is not None:
            return math.ceil(self.flops / (flops_a_sequence * sequences))
        if self.rst_hours is None or self.measured:
            return None
        if self.reference == "rtx3090":
            seconds = RTX3090[-1] / RTX3090_SEQUENCES
        elif self.reference == "flops":
            seconds = flops_a_sequence / flop_rate()
        else:
            assert isinstance(self.reference, Table)
            seconds = max(self.reference.seconds["train"].values())
        return math.ceil(3600 * self.rst_hours / (seconds * sequences))


def rtx3090(kind: str, layers: int, sequences: int) -> float:
    """Seconds of passes through the crammed BERT on the reference machine.

    Raises:
        ValueError: no multiple of the 128 sequences that were measured, or more layers than 16.
    """
    if sequences % RTX3090_SEQUENCES:
        raise ValueError(f"the RTX 3090's times are of {RTX3090_SEQUENCES} sequences, and {sequences} is no multiple")
    if not 1 <= layers <= len(RTX3090):
        raise ValueError(f"the RTX 3090's times are of 1 to {len(RTX3090)} layers, not {layers}")
    seconds = RTX3090[layers - 1]
    if kind == "forward":
        seconds *= RTX3090_FORWARD / RTX3090[-1]
    return seconds * (sequences / RTX3090_SEQUENCES)


def flops(layer: float, rest: float) -> Price:
    """FLOPs of passes, from those of a sequence's forward pass through a layer and through everything else.

    A backward pass costs two forward passes (Kaplan et al., 2020, arXiv 2001.08361, section 2.1).
    """

    def price(kind: str, layers: int, sequences: int) -> float:
        return (1 if kind == "forward" else 3) * (layers * layer + rest) * sequences

    return price


def forward_flops(matrices: float, dim: int, seq_len: int) -> float:
    """FLOPs of a sequence's forward pass through a layer: two a weight and token, and attention's two products."""
    return 2.0 * matrices * seq_len + 4.0 * dim * seq_len**2


def flop_rate() -> float:
    """FLOPs a second that the RTX 3090 reached with the crammed BERT: its table's last entry, by our count of FLOPs."""
    seq_len, vocab, mask_rate = 128, 32768, 0.15
    dim, ffn = CRAMMED["dim"], CRAMMED["ffn"]
    layer = forward_flops(4 * dim * dim + dim * ffn + dim * ffn // 2, dim, seq_len)
    head = 2.0 * (dim * dim + dim * vocab) * seq_len * mask_rate  # only masked tokens reach it
    return flops(layer, head)("train", 16, RTX3090_SEQUENCES) / RTX3090[-1]


def unfit_reference(budget: Budget, model: Mapping[str, Any], global_batch: int, seq_len: int) -> str | None:
    """Why the RTX 3090's table says nothing about a training, or None."""
    if budget.rst_hours is None or budget.reference != "rtx3090":
        return None
    shape = {key: model.get(key) for key in CRAMMED}
    if not model.get("crammed") or shape != CRAMMED or seq_len != 128:
        return (
            "reference rtx3090 was measured with the crammed BERT of 16 layers and width 768 on sequences of 128 "
            "tokens: use reference flops, measured, or a timing.json of your own"
        )
    if global_batch != RTX3090_BATCH:
        return f"reference rtx3090 was measured with a global batch of {RTX3090_BATCH}, not {global_batch}"
    return None


def unfit_count(budget: Budget | None, name: str, sequences: int) -> str | None:
    """Why the RTX 3090's table has no time for passes of so many sequences, or None."""
    if budget is None or budget.rst_hours is None or budget.reference != "rtx3090" or not sequences % RTX3090_SEQUENCES:
        return None
    return f"reference rtx3090 was measured with {RTX3090_SEQUENCES} sequences, and {name} {sequences} is no multiple"
