"""The base of every settings class, and the marks that keep a field out of fingerprints."""

from __future__ import annotations

from typing import Annotated, Any, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

PluginSettings = dict[str, Any]


def _named(given: Any) -> Any:
    if isinstance(given, dict):
        for name, settings in given.items():
            if not isinstance(settings, dict | None):
                raise ValueError(f"the settings of {name} are no mapping: give {{{name}: {{setting: value}}}}")
        return {name: settings or {} for name, settings in given.items()}  # `bitflip:` with nothing below it
    if given is not None and not isinstance(given, str):
        raise ValueError("give a name, or {name: {setting: value}}")
    return given


Named = Annotated[str | dict[str, PluginSettings], BeforeValidator(_named)]
"""Plug-ins by name, as they are in config.yaml or with settings of their own."""

_TRUTH = PydanticCustomError("truth_value", "true or false where another value is expected")


class Settings(BaseModel):
    """Frozen, typed settings; an unknown key or a wrong type is an error.

    Every field is semantic (it enters the fingerprint of the stages that read it) unless it is
    made with `operational`, or made with `added` and left at its default.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, given: Any) -> Any:
        """`seed: yes` would be 1: to YAML yes, no, on and off are truth values, and Python takes those for numbers."""
        wrong = [
            InitErrorDetails(type=_TRUTH, loc=(key,), input=value)
            for key, value in (given.items() if isinstance(given, dict) else ())
            if isinstance(value, bool)
            and key in cls.model_fields
            and not _admits_bool(cls.model_fields[key].annotation)
        ]
        if wrong:
            raise ValidationError.from_exception_data(cls.__name__, wrong)
        return given

    def semantic(self) -> dict[str, Any]:
        """The settings as plain JSON values, without the operational ones and `added` ones at their default."""
        return _prune(self)

    def operational(self) -> dict[str, Any]:
        """The operational settings that are not at their default, as plain JSON values; those of parts are left out."""
        return {
            name: getattr(self, name)
            for name, field in type(self).model_fields.items()
            if _marks(field).get("operational") and getattr(self, name) != field.default
        }


def added(default: Any, description: str, **constraints: Any) -> Any:
    """A semantic field that came later: at its default it is left out, so that results made before it stand."""
    return Field(default, description=description, json_schema_extra={"added": True}, **constraints)


def operational(default: Any, description: str, **constraints: Any) -> Any:
    """A field that changes how a stage runs (devices, logging, batching) but never its result."""
    return Field(default, description=description, json_schema_extra={"operational": True}, **constraints)


def _admits_bool(annotation: Any) -> bool:
    return annotation in (bool, Any) or isinstance(annotation, bool) or any(map(_admits_bool, get_args(annotation)))


def _prune(value: Any) -> Any:
    if isinstance(value, BaseModel):
        fields = type(value).model_fields
        return {name: _prune(getattr(value, name)) for name in fields if not _is_left_out(fields[name], value, name)}
    if isinstance(value, dict):
        return {key: _prune(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_prune(item) for item in value]
    return value


def _marks(field: Any) -> dict[str, Any]:
    return field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}


def _is_left_out(field: Any, owner: BaseModel, name: str) -> bool:
    marks = _marks(field)
    return bool(marks.get("operational")) or bool(marks.get("added") and getattr(owner, name) == field.default)
