"""What an evaluation has finished, kept in its work dir to go on from after a kill."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline_lib.artifacts.files import read_json, write_json
from pipeline_lib.artifacts.progress import say
from pipeline_lib.config.fingerprint import canonical
from pipeline_lib.evaluation.base import Outcome
from pipeline_lib.evaluation.statistics import encode


class Notes:
    """Finished runs in the work dir; damaged or foreign ones are not believed."""

    def __init__(self, folder: Path | None, mark: str) -> None:
        self._folder, self._mark = folder, mark

    def read(self, key: str) -> Outcome | None:
        """A finished run; None if there is none to believe."""
        values = self._value(key)
        if values is None:
            return None
        numbers = {name: float(value) for name, value in values["metrics"].items()}
        return Outcome(**{**values, "metrics": numbers})

    def write(self, key: str, outcome: Outcome) -> None:
        """Keep a finished run."""
        values = {**vars(outcome), "metrics": {name: encode(value) for name, value in outcome.metrics.items()}}
        self._keep(key, values)

    def once(self, key: str, name: str, make: Callable[[], Any]) -> Any:
        """The part `name` of a run: what was kept of an earlier attempt, or what `make` gives."""
        part = f"{key}.{name}"
        found = self._value(part)
        if found is None:
            found = make()
            self._keep(part, found)
        return found

    def _value(self, key: str) -> Any:
        path = self._folder / f"{key}.json" if self._folder else None
        if path is None or not path.exists():
            return None
        try:
            note = read_json(path)
            if note["mark"] == self._mark and note["sha256"] == _sha256(note["outcome"]):
                return note["outcome"]
        except (ValueError, KeyError, TypeError):
            pass
        say(f"{path} is damaged or of another evaluation; this run is made again")
        return None

    def _keep(self, key: str, values: Any) -> None:
        if self._folder is not None:
            write_json(self._folder / f"{key}.json", {"mark": self._mark, "sha256": _sha256(values), "outcome": values})


def _sha256(value: Any) -> str:
    return hashlib.sha256(canonical(value).encode()).hexdigest()
