"""Trying again after failures that pass, and one clear error for those that do not."""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from pipeline_lib.artifacts.progress import say
from pipeline_lib.config.errors import UserError

TRIES = 6  # in a row without progress
PROGRESS = 1 << 20  # bytes
LONGEST_WAIT_S = 600.0  # a server that asks for more is not waited for
AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})
LATER = "give the same command again later; what has been downloaded is kept"

Value = TypeVar("Value")


class Answer(Exception):
    """The server answered with something other than the content."""

    def __init__(self, status: int, headers: Mapping[str, str]) -> None:
        super().__init__(f"the server answered {status}")
        self.status, self.headers = status, headers


class Patience:
    """Tries again after failures that pass, waiting longer each time, until TRIES in a row brought nothing."""

    def __init__(self, what: str, page: str = "") -> None:
        self.what, self.page, self.failures, self._bytes = what, page, 0, 0

    def progressed(self, count: int) -> None:
        """`count` new bytes came in; a megabyte of them forgives the failures before."""
        self._bytes += count
        if self._bytes >= PROGRESS:
            self.failures, self._bytes = 0, 0

    def call(self, action: Callable[[], Value]) -> Value:
        """The value of `action`, tried again as often as it takes.

        Raises:
            UserError: it cannot be had.
        """
        while True:
            try:
                return action()
            except Exception as error:
                answer = _answer(error)
                if answer is None and not _is_network(error):
                    told = _local_trouble(error, self.what)
                    if told is None:
                        raise
                    raise told from error
                if answer is not None and answer.status not in AGAIN:
                    raise refusal(answer, self.what, self.page) from None
                self._wait(answer, str(error) or type(error).__name__)

    def _wait(self, answer: Answer | None, reason: str) -> None:
        self.failures += 1
        reason = f"the server answered {answer.status}" if answer else reason.splitlines()[0]
        asked = _retry_after(answer.headers) if answer else None
        if self.failures >= TRIES or (asked or 0) > LONGEST_WAIT_S:
            wait = f" and asks to wait {asked:.0f} s" if asked else ""
            raise UserError(
                f"cannot be downloaded: {reason}{wait} (tried {self.failures} times)", where=self.what, fix=LATER
            )
        delay = asked if asked is not None else min(2.0 ** (self.failures - 1), 30.0)
        say(f"{self.what}: {reason}; trying again in {delay:.0f} s")
        time.sleep(delay)


def _answer(error: BaseException) -> Answer | None:
    """The server's refusal in `error`, be it ours or the hub client's."""
    if isinstance(error, Answer):
        return error
    response: Any = getattr(error, "response", None)
    return Answer(response.status_code, response.headers) if response is not None else None


def _is_network(error: BaseException) -> bool:
    from huggingface_hub.errors import OfflineModeIsEnabled

    # The hub client's HTTP library changed its name between versions, so it is known by its base class.
    transport = any(kind.__name__ == "TransportError" for kind in type(error).__mro__)
    lost = isinstance(error, ConnectionError | TimeoutError) and not isinstance(error, OfflineModeIsEnabled)
    return transport or lost


def _local_trouble(error: Exception, what: str) -> UserError | None:
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return UserError("must be downloaded, but HF_HUB_OFFLINE is set", where=what, fix="unset HF_HUB_OFFLINE")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
        return UserError(f"cannot be written: {error}", where=what, fix="make room (or the folder writable); " + LATER)
    return None


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds the server asks to wait: Retry-After in seconds, or the reset time of the RateLimit header."""
    value = headers.get("Retry-After", "")
    if value.isdigit():
        return float(value)
    match = re.search(r";\s*r=0\b.*;\s*t=(\d+)", headers.get("RateLimit", ""))
    return float(match.group(1)) if match else None


def refusal(answer: Answer, what: str, page: str) -> UserError:
    """The message for a server's definite no."""
    code = answer.headers.get("X-Error-Code", "")
    see = f" (see {page})" if page else ""
    token = "set the environment variable HF_TOKEN to a token that has access"
    if os.environ.get("HF_TOKEN"):
        token = "the token in HF_TOKEN gives no access: use another"
    reasons = {
        401: ("not there, or not open to everyone", f"check the name; for a private or gated repository {token}{see}"),
        403: ("access is refused", f"accept the terms of the repository{see}; {token}"),
        404: (
            {"RevisionNotFound": "no such revision", "RepoNotFound": "no such repository"}.get(code, "no such file"),
            f"check the name and the revision{see}",
        ),
    }
    what_is_wrong, fix = reasons.get(answer.status, ("the server refuses", f"check the address{see}"))
    if code == "GatedRepo":
        what_is_wrong, fix = reasons[403]
    return UserError(f"{what_is_wrong}: status {answer.status}", where=what, fix=fix)
