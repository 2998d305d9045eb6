"""Stopping in good order: SIGTERM and a clock of our own, agreed over all ranks."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType, TracebackType
from typing import Any

from pipeline_lib.artifacts.progress import say

MARGIN_S = 120.0
"""How long before the time limit the clock asks to stop (a fifth of the limit where that is less)."""

STARTED_VARIABLE = "ERRATA_STARTED"
"""Environment variable with the wall-clock time (s since the epoch) at which the stage began."""


def mark_start() -> None:
    """Note the beginning of the stage, for its clock and those of its worker processes."""
    os.environ[STARTED_VARIABLE] = repr(time.time())


_early: list[int] = []


def remember_sigterm() -> None:
    """Let a SIGTERM wait for the first `StopRequest`: a rank may be asked to stop while it is still importing torch."""
    signal.signal(signal.SIGTERM, lambda number, frame: _early.append(number))


class StopRequest:
    """Tells at the end of a step whether to save and stop.

    The handler only sets a flag, so a second SIGTERM while a checkpoint is written changes nothing.
    Make it in the main thread; `close` (or leaving the `with` block) puts the former handler back.

    Args:
        time_limit_s: wall-clock seconds the stage may use, counted from `mark_start`; None for no limit.
    """

    def __init__(self, time_limit_s: float | None) -> None:
        self._signalled = bool(_early)
        self._announced = False
        started = float(os.environ.get(STARTED_VARIABLE, time.time()))
        self._deadline = None if time_limit_s is None else started + time_limit_s - min(MARGIN_S, time_limit_s / 5)
        self._former: Any = signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True

    def requested(self) -> bool:
        """Whether this process has been asked, or its time is up (it asks no other rank)."""
        return self._signalled or (self._deadline is not None and time.time() >= self._deadline)

    def agreed(self) -> bool:
        """Whether any rank was asked to stop. All ranks must call it at the same step and get the same answer."""
        from pipeline_lib.training.distributed import any_rank

        stop = any_rank(self.requested())
        if stop and not self._announced:
            self._announced = True
            here = "SIGTERM" if self._signalled else "time limit near" if self.requested() else "another rank was asked"
            say(f"{here}: saving, then stopping")
        return stop

    def close(self) -> None:
        """Put the former SIGTERM handler back."""
        signal.signal(signal.SIGTERM, self._former)

    def __enter__(self) -> StopRequest:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
