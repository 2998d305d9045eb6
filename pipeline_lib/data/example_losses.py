"""The loss of every training sequence: what the stage `score` and `import-losses` leave, and rho-loss reads."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from pipeline_lib.artifacts.files import read_json, sync, write_json
from pipeline_lib.config.errors import UserError
from pipeline_lib.data.tokens import TokenShards

LOSSES, REPORT = "losses.safetensors", "score.json"
HASHED_AT_A_TIME = 2**22


@dataclass(frozen=True)
class ExampleLosses:
    """A loss for each sequence of a training split.

    Attributes:
        loss_N: float32, mean over sequence n's targets in nats; NaN for a sequence without targets.
        seq_len: tokens a sequence.
        digest: `sequences_digest` of these sequences.
        masks: of an encoder's losses, the `seed` and `rate` of the masks they were measured with (null: not known).
            None for a decoder.
    """

    loss_N: np.ndarray
    seq_len: int
    digest: str
    masks: dict[str, Any] | None

    def save(self, folder: Path) -> None:
        """Write losses.safetensors and score.json."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"loss": self.loss_N}, folder / LOSSES)
        sync(folder / LOSSES)
        known = self.loss_N[np.isfinite(self.loss_N)].astype(np.float64)
        result = {
            "sequences": len(self.loss_N),
            "without_targets": len(self.loss_N) - len(known),
            "mean": float(known.mean()) if len(known) else None,
            "std": float(known.std()) if len(known) else None,
            "seq_len": self.seq_len,
            "sequences_digest": self.digest,
            "masks": self.masks,
        }
        write_json(folder / REPORT, {"result": result, "provenance": {}})

    @staticmethod
    def load(folder: Path) -> ExampleLosses:
        """Read what `save` wrote.

        Raises:
            UserError: the folder holds no such files, or they do not agree.
        """
        try:
            result = read_json(folder / REPORT)["result"]
            loss_N = load_file(folder / LOSSES)["loss"]
            found = ExampleLosses(loss_N, result["seq_len"], result["sequences_digest"], result["masks"])
            whole = loss_N.shape == (result["sequences"],) and loss_N.dtype == np.float32
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"no losses of sequences: {error}",
                where=str(folder),
                allowed=f"a folder with {LOSSES} and {REPORT}",
                fix="make it with `python -m pipeline_lib import-losses`",
            ) from None
        if not whole:
            raise UserError(
                f"{LOSSES} and {REPORT} do not agree",
                where=str(folder),
                value=f"{loss_N.dtype} {list(loss_N.shape)}",
                allowed=f"float32 [{result['sequences']}]",
                fix="make them again",
            )
        return found


def sequence_count(shards: TokenShards, seq_len: int) -> int:
    """Sequences of a split, as training counts them: the last one has a token after it."""
    return max((shards.n_tokens - 1) // seq_len, 0)


def sequences_digest(shards: TokenShards, seq_len: int, count: int | None = None) -> str:
    """Hex SHA-256 of a split's first `count` sequences (all) in order: `seq_len`, and ids as little-endian uint32."""
    total = (sequence_count(shards, seq_len) if count is None else count) * seq_len
    starts = range(0, total, HASHED_AT_A_TIME)
    return digest_of(seq_len, (shards.read(start, min(HASHED_AT_A_TIME, total - start)) for start in starts))


def digest_of(seq_len: int, pieces: Iterable[np.ndarray]) -> str:
    """`sequences_digest` of token ids that come in pieces: integer arrays of any shape."""
    digest = hashlib.sha256(f"{seq_len}:".encode())
    for piece in pieces:
        digest.update(np.ascontiguousarray(piece, "<u4").tobytes())
    return digest.hexdigest()


def check_same(losses: ExampleLosses, shards: TokenShards, where: str) -> None:
    """Make sure that losses belong to the sequences of `shards`.

    Raises:
        UserError: they were measured on others.
    """
    own = sequences_digest(shards, losses.seq_len)
    if losses.digest != own or len(losses.loss_N) != sequence_count(shards, losses.seq_len):
        raise UserError(
            "the losses are of other sequences than those that are trained on",
            where=where,
            value=f"{len(losses.loss_N)} sequences, digest {losses.digest}",
            allowed=f"{sequence_count(shards, losses.seq_len)} sequences of {losses.seq_len} tokens, digest {own}",
            fix="use losses of this very dataset: name an experiment that is trained on its holdout",
        )
