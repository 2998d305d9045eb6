"""Canonical JSON and the fingerprints made from it (DESIGN §4)."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

from pipeline_lib.config.errors import UserError


def canonical(value: Any) -> str:
    """The one JSON text of `value`: sorted keys, no spaces, no NaN.

    Raises:
        UserError: a value is not plain JSON (a callable, a tuple key, NaN, an infinity): its text
            could differ between runs, so it may not enter an identity.
    """
    _check(value, "$")
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)


def fingerprint(value: Any) -> str:
    """Hex SHA-256 of the canonical JSON of `value`."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def _check(value: Any, where: str) -> None:
    kind = type(value)
    if kind is dict:
        for key, item in value.items():
            if type(key) is not str:
                raise UserError(
                    "a setting's key is not a string", where=where, value=key, fix="quote it in config.yaml"
                )
            _check(item, f"{where}.{key}")
    elif kind is list or kind is tuple:
        for index, item in enumerate(value):
            _check(item, f"{where}[{index}]")
    elif kind is float:
        if not math.isfinite(value):
            raise UserError("not a finite number", where=where, value=value, allowed="finite numbers")
    elif value is not None and kind not in (str, int, bool):
        raise UserError(
            f"a {kind.__name__} cannot enter a fingerprint",
            where=where,
            value=value,
            allowed="null, booleans, numbers, strings, lists and maps",
        )
