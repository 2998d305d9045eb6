"""`import-losses`: published pickles of per-example losses as a folder that an experiment's `losses:` can name."""

from __future__ import annotations

import argparse
from pathlib import Path

from pipeline_lib.artifacts.progress import say
from pipeline_lib.config.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("pickles", type=Path, help="folder with dict_chunk_0.pkl, dict_chunk_1.pkl, …")
    parser.add_argument("tokens", type=Path, help="the artifact results/store/tokens/… that will be trained on")
    parser.add_argument("--out", type=Path, required=True, help="folder to write: losses.safetensors and score.json")
    parser.add_argument("--seq-len", type=int, default=128, help="tokens a sequence (default: 128)")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--digest", help="SHA-256 of the sequences behind the losses, as score.json states it")
    source.add_argument("--dataset", type=Path, help="the prepared dataset (save_to_disk) behind the losses")
    parser.add_argument("--holdout", type=float, help="with --dataset: share that was split off first, e.g. 0.2")


def run(arguments: argparse.Namespace) -> int:
    """Check that the losses belong to the tokens, and write them; nothing is written otherwise."""
    from pipeline_lib.data.published_losses import matched, prepared_digest, read_pickles
    from pipeline_lib.data.tokens import TokenShards

    if not (arguments.tokens / "tokens.json").is_file():
        raise UserError(
            "no tokens", where=str(arguments.tokens), allowed="a folder results/store/tokens/<name>",
            fix="train the baseline on the dataset first; `python -m pipeline_lib explain` names its tokens",
        )  # fmt: skip
    shards = TokenShards(arguments.tokens, "train")
    digest, losses = arguments.digest, read_pickles(arguments.pickles)
    if digest is None:
        digest, count = prepared_digest(arguments.dataset, arguments.seq_len, arguments.holdout)
        if count != len(losses):
            raise UserError(
                "the prepared dataset has another number of sequences than there are losses",
                where=str(arguments.dataset), value=count, allowed=str(len(losses)),
                fix="give the --holdout that the losses were extracted with (0.2 in the paper)",
            )  # fmt: skip
    found = matched(losses, shards, arguments.seq_len, digest, str(arguments.tokens))
    found.save(arguments.out)
    say(f"{len(found.loss_N)} losses in {arguments.out}: name them with `losses: {{folder: {arguments.out}}}`")
    return 0
