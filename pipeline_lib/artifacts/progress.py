"""Progress of long work: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm


def say(message: str) -> None:
    """One line to the log (stderr), marked as ours."""
    print(f"errata: {message}", file=sys.stderr, flush=True)


class Progress:
    """Counts `total` units; shows rate, figures and time left.

    On a terminal this is a bar; elsewhere one line at most every `every_s` seconds, and at the end.
    """

    def __init__(self, label: str, total: int | None, unit: str, done: int = 0, every_s: float = 10.0) -> None:
        self.label, self.total, self.unit, self.done, self.every_s = label, total, unit, done, every_s
        self._start, self._last, self._first = time.monotonic(), 0.0, done
        self._bar = tqdm(total=total, desc=label, unit=unit, initial=done) if sys.stderr.isatty() else None

    def update(self, count: int = 1, **figures: float) -> None:
        """`count` more units are done; `figures` (loss, tokens_per_s, …) are shown beside."""
        self.done += count
        text = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(count)
            return
        now = time.monotonic()
        if now - self._last >= self.every_s or self.done == self.total:
            self._last = now
            self._line(now, text)

    def _line(self, now: float, text: str) -> None:
        rate = (self.done - self._first) / max(now - self._start, 1e-9)
        of = f"/{self.total}" if self.total is not None else ""
        left = f", {(self.total - self.done) / rate:.0f} s left" if self.total is not None and rate > 0 else ""
        say(f"{self.label}: {self.done}{of} {self.unit}{', ' + text if text else ''}, {rate:.3g} {self.unit}/s{left}")

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
