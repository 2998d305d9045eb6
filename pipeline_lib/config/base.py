"""The base of every settings class, and the marks that keep a field out of fingerprints."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Settings(BaseModel):
    """Frozen, typed settings; an unknown key or a wrong type is an error.

    Every field is semantic (it enters the fingerprint of the stages that read it) unless it is
    made with `operational`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def semantic(self) -> dict[str, Any]:
        """The settings as plain JSON values, without the operational ones."""
        return _prune(self)


def operational(default: Any, description: str, **constraints: Any) -> Any:
    """A field that changes how a stage runs (devices, logging, batching) but never its result."""
    return Field(default, description=description, json_schema_extra={"operational": True}, **constraints)


def later(default: Any, description: str, **constraints: Any) -> Any:
    """A field that came when results existed without it: left out of the fingerprint at its default, so that they stay
    what they are."""
    return Field(default, description=description, json_schema_extra={"later": True}, **constraints)


def _prune(value: Any) -> Any:
    if isinstance(value, BaseModel):
        fields = type(value).model_fields
        kept = (name for name, field in fields.items() if not _is_left_out(field, getattr(value, name)))
        return {name: _prune(getattr(value, name)) for name in kept}
    if isinstance(value, dict):
        return {key: _prune(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_prune(item) for item in value]
    return value


def _is_left_out(field: Any, value: Any) -> bool:
    extra = field.json_schema_extra
    if not isinstance(extra, dict):
        return False
    return bool(extra.get("operational")) or bool(extra.get("later") and value == field.default)
