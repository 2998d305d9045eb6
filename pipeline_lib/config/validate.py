"""From pydantic's errors to one `UserError` that names file, key, value, what is allowed and the fix."""

from __future__ import annotations

import typing
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from pipeline_lib.config.errors import UserError, closest

Model = TypeVar("Model", bound=BaseModel)


def validate(model: type[Model], data: Any, where: str) -> Model:
    """`data` as a `model`.

    Raises:
        UserError: the first thing that is wrong with it.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise _user_error(model, error, where) from None


def _user_error(model: type[BaseModel], error: ValidationError, where: str) -> UserError:
    first = error.errors(include_url=False)[0]
    path = [str(part) for part in first["loc"] if not str(part).startswith(("function-", "tagged-"))]
    owner = _owner(model, [str(part) for part in first["loc"]])
    key = _join(where, path)
    names = [field.alias or name for name, field in owner.model_fields.items()] if owner else []
    kind = first["type"]
    if kind == "extra_forbidden":
        return UserError(
            "unknown key",
            where=key,
            value=first["input"],
            allowed=sorted(names),
            fix=closest(path[-1], names) or "remove it",
        )
    if kind == "missing":
        return UserError("missing key", where=key, allowed=_described(owner, path[-1]), fix=f"add `{path[-1]}:` here")
    message = first["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    allowed = _described(owner, path[-1]) if path else None
    return UserError(message, where=key, value=first["input"], allowed=allowed, fix="change the value")


def _join(where: str, path: list[str]) -> str:
    if not path:
        return where
    return f"{where}.{'.'.join(path)}" if ": " in where else f"{where}: {'.'.join(path)}"


def _owner(model: type[BaseModel], path: list[str]) -> type[BaseModel] | None:
    """The settings class that holds the last key of `path`, if it can be found from the annotations."""
    current: Any = model
    for part in path[:-1]:
        if isinstance(current, type) and issubclass(current, BaseModel):
            fields = {field.alias or name: field for name, field in current.model_fields.items()}
            current = _inner(fields[part].annotation) if part in fields else current
    return current if isinstance(current, type) and issubclass(current, BaseModel) else None


def _inner(annotation: Any) -> Any:
    """The settings class inside `X | None`, `dict[str, X]` or `list[X]`; else the annotation."""
    if isinstance(annotation, type) and not typing.get_args(annotation):
        return annotation
    for argument in typing.get_args(annotation):
        found = _inner(argument)
        if isinstance(found, type) and issubclass(found, BaseModel):
            return found
    return annotation


def _described(owner: type[BaseModel] | None, key: str) -> str | None:
    if owner is None:
        return None
    for name, field in owner.model_fields.items():
        if key in (name, field.alias):
            return field.description or str(field.annotation)
    return None
