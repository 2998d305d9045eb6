"""Runs stages in forked processes of a server that has imported everything once: `python -m tests.matrix.server`.

Each is a real process, killed for real; only start-up is shared. One JSON line a request comes in, one an answer
goes out.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import lm_eval.evaluator  # noqa: F401
import torch
import transformers.models.bert.modeling_bert
import transformers.models.llama.modeling_llama
import transformers.trainer  # noqa: F401

from pipeline_lib.artifacts.provenance import commit
from pipeline_lib.config.stages import STAGES
from pipeline_lib.evaluation import sequences  # noqa: F401
from pipeline_lib.stages import runner
from pipeline_lib.training import hf, loop  # noqa: F401
from pipeline_lib.training.titan import device

device.prepare()  # torchtitan looks for a device when it is imported
import pipeline_lib.training.titan.trainer  # noqa: E402, F401

for _name in STAGES:
    importlib.import_module(f"pipeline_lib.stages.{_name}")


def stage(manifest: str, die_after_step: int | None, seals: str) -> int:
    """Run a stage as its rule does, and note the checkpoints that it seals.

    Args:
        die_after_step: SIGKILL at the first file opened after the checkpoint of this step was sealed.
        seals: file that gets the number of every step whose checkpoint was sealed.
    """
    note = os.open(seals, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    doomed = False

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal doomed
        if doomed and event == "open":
            os.kill(os.getpid(), signal.SIGKILL)
        if event == "os.rename" and str(arguments[1]).endswith("/seal.json"):
            step = int(Path(os.fsdecode(arguments[1])).parent.name.removeprefix("step-"))
            os.write(note, f"{step}\n".encode())
            doomed = step == die_after_step

    sys.addaudithook(hook)
    return runner.run_stage(Path(manifest), threads=1)


def reload(convert_artifact: str, train_artifact: str | None, transform: list[dict[str, Any]]) -> int:
    """Load an exported checkpoint as a user would, compare it with the trained weights, run it under its transform."""
    from pipeline_lib.models.checkpoint import checkpoint_directory, load_model, load_state, load_transform
    from pipeline_lib.transforms.apply import apply
    from pipeline_lib.transforms.state import load_transform_state, transform_state

    directory = checkpoint_directory(Path(convert_artifact))
    model: Any = load_model(directory, "float32")
    if train_artifact is not None:
        loaded, trained = model.state_dict(), load_state(Path(train_artifact))
        assert trained
        for name, value in trained.items():
            assert torch.equal(loaded[name], value), name
    applied = apply(model, transform, seed=1)
    _, added = load_transform(directory)
    if added and transform_state(model):
        load_transform_state(model, added)
    applied.context.begin(0, 0)
    tokens_BT = torch.arange(24).view(2, 12) % model.config.vocab_size
    with torch.no_grad():
        logits_BTV = model(input_ids=tokens_BT).logits
    assert logits_BTV.shape == (2, 12, model.config.vocab_size)
    assert torch.isfinite(logits_BTV).all()
    assert bool(applied.report["layers"]) == bool(transform), "a transform acts on some site"
    return 0


CALLS = {"stage": stage, "reload": reload}


def serve(request: dict[str, Any]) -> int:
    """Do a request in a process of its own; its exit code, -9 for a kill."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status)
    code = 1
    try:
        os.chdir(request["cwd"])
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = CALLS[request["call"]](**request["arguments"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    """Answer requests until there are no more."""
    torch.set_num_threads(1)
    commit()  # asked from git once, for all
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        answers.write(json.dumps(serve(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
