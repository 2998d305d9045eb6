"""What a forked rank of `training_bench` does: watch, be sabotaged, train. Imported once by the fork server."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers.models.bert.modeling_bert
import transformers.models.llama.modeling_llama
import transformers.trainer  # noqa: F401

from pipeline_lib.artifacts.files import write_json
from pipeline_lib.data.records import RecordLoader
from pipeline_lib.data.tokens import BatchLoader
from pipeline_lib.training import relora, worker
from pipeline_lib.training.metrics import MetricsLog
from pipeline_lib.training.titan import device
from pipeline_lib.transforms.base import Draw, Fault
from pipeline_lib.transforms.compose import SiteFunctions

device.prepare()  # torchtitan looks for a device when it is imported
import pipeline_lib.training.titan.trainer  # noqa: E402, F401

if TYPE_CHECKING:
    from tests.training_bench import Sabotage


def main(work: Path, rank: int, sabotage: Sabotage | None) -> None:
    """Train as `rank`; exits with the worker's code."""
    log = os.open(work / f"stderr-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    _Watcher(work, rank, sabotage)
    code = worker.main(work / "job.json")
    sys.stderr.flush()
    os._exit(code)  # the fork server's own exit handlers are not this rank's


class _Watcher:
    """Counts the places that a rank passes, acts at the one it is told, and records what the rank sees."""

    def __init__(self, work: Path, rank: int, sabotage: Sabotage | None) -> None:
        self.work, self.rank = work, rank
        self.sabotage = sabotage if sabotage is not None and sabotage.rank == rank else None
        self.counts: Counter[str] = Counter()
        self.seen = open(work / f"seen-{rank}-{os.getpid()}.jsonl", "w", buffering=1, encoding="utf-8")  # noqa: SIM115
        self._watch_batches()
        self._watch_masks()
        self._watch_writes()
        self._watch_log()
        self._watch_merges()

    def passes(self, place: str) -> bool:
        """Count; True when this is where the rank is to be stopped half-way."""
        self.counts[place] += 1
        plan = self.sabotage
        if plan is None or plan.place != place or plan.number != self.counts[place]:
            return False
        if plan.action == "term":
            os.kill(os.getpid(), signal.SIGTERM)
            return False
        return True

    def die(self) -> None:
        """As a kill from outside: nothing is flushed, no handler runs."""
        os.kill(os.getpid(), signal.SIGKILL)

    def record(self, kind: str, place: str, data: bytes) -> None:
        """Note what was seen at a place."""
        self.seen.write(json.dumps([kind, place, hashlib.sha256(data).hexdigest()]) + "\n")

    def _watch_batches(self) -> None:
        for kind in (BatchLoader, RecordLoader):
            self._watch_loader(kind)

    def _watch_loader(self, kind: type[Any]) -> None:
        original = kind.batch

        def batch(loader: Any, step: int, first: int, count: int) -> Any:
            if self.passes("batch"):
                self.die()
            inputs_BT, labels_BT = original(loader, step, first, count)
            for row in range(count):
                data = inputs_BT[row].numpy().tobytes() + labels_BT[row].numpy().tobytes()
                self.record("sequences", f"step {step} sequence {first + row}", data)
            return inputs_BT, labels_BT

        kind.batch = batch

    def _watch_masks(self) -> None:
        original = SiteFunctions.__init__

        def init(functions: SiteFunctions, *args: Any, **kwargs: Any) -> None:
            original(functions, *args, **kwargs)
            functions.faults = [(i, _Recorded(fault, functions, self)) for i, fault in functions.faults]

        SiteFunctions.__init__ = init  # type: ignore[method-assign]

    def _watch_writes(self) -> None:
        original: Callable[[int], None] = os.fsync

        def fsync(descriptor: int) -> None:
            if self.passes("write"):
                self.die()
            original(descriptor)

        os.fsync = fsync

    def _watch_merges(self) -> None:
        """Each layer's new master rows, each new base, the optimizer's restart, and each file of master weights."""

        def watched(original: Any) -> Any:
            def function(*args: Any, **kwargs: Any) -> Any:
                if self.passes("merge"):
                    self.die()
                return original(*args, **kwargs)

            return function

        for owner, name in (
            (relora.ReLoRAHooks, "_merged"),
            (relora.ReLoRAHooks, "_load_base"),
            (relora, "restart_optimizer"),
            (relora, "save_masters"),
        ):
            setattr(owner, name, watched(getattr(owner, name)))

    def _watch_log(self) -> None:
        original, close = MetricsLog.log, MetricsLog.close

        def log(metrics: MetricsLog, step: int, **figures: float) -> None:
            if self.passes("log"):
                with open(self.work / "metrics.jsonl", "a", encoding="utf-8") as file:
                    file.write('{"step": ')
                self.die()
            original(metrics, step, **figures)

        def closing(metrics: MetricsLog, finished: bool = True) -> None:
            close(metrics, finished)
            write_json(self.work / f"counts-{self.rank}.json", dict(self.counts))

        MetricsLog.log, MetricsLog.close = log, closing  # type: ignore[method-assign]


class _Recorded(Fault):
    """A fault that notes the mask (bits of the tensor that changed) of each row."""

    def __init__(self, fault: Fault, functions: SiteFunctions, watcher: _Watcher) -> None:
        self.fault, self.functions, self.watcher = fault, functions, watcher
        self.roles = fault.roles

    def __call__(self, tensor: torch.Tensor, role: str, draw: Draw) -> torch.Tensor:
        faulty = self.fault(tensor, role, draw)
        with torch.no_grad():
            changed = faulty.contiguous().view(torch.uint8) ^ tensor.contiguous().view(torch.uint8)
        context, first = self.functions.context, int(draw.first_row)
        for row, mask in enumerate(changed):
            place = f"step {int(context.step)} {self.functions.site.name} {role} row {first + row}"
            self.watcher.record("masks", place, mask.numpy().tobytes())
        return faulty
