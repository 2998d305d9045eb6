"""Settings of `bitflip`. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from pipeline_lib.config.base import Settings as Base
from pipeline_lib.config.base import added
from pipeline_lib.numerics.flip_plan import probability_problem
from pipeline_lib.transforms.patterns import IN_LAYERS, SitePatterns, merge

OPERANDS: dict[str, dict[str, str]] = {
    "linear": {"weight": "weight", "input": "input"},
    "embedding": {"weight": "embedding"},
    "product": {"left": "left", "right": "right"},
    "kv": {"key": "key", "value": "value"},
}
"""Kind of site -> role there -> the settings field with the operand's probabilities."""

LAYERS: Any = {IN_LAYERS: {}}


_MOST = 14  # different probabilities in one plan


def _check_probability(p: float) -> float:
    problem = probability_problem(p)
    if problem:
        raise ValueError(problem)
    return p


Probability = Annotated[float, AfterValidator(_check_probability)]


def _check_bits(value: Any) -> Any:
    """Keys as the strings that a spec holds; a bit that is given anew, by a pattern, counts last."""
    if not isinstance(value, dict):
        raise ValueError(f"bits must map bit numbers to probabilities, got {value!r}")
    for key in value:
        if isinstance(key, bool) or not str(key).isdecimal() or int(key) > 31:
            raise ValueError(f"{key!r} is no bit number; allowed are 0, the least significant bit, to 31")
    return {str(int(key)): p for key, p in value.items()}


Bits = Annotated[dict[str, Probability], BeforeValidator(_check_bits)]


class Operand(Base):
    """What happens to one operand of an operation."""

    p: Probability = Field(
        default=0.0, description="probability that a bit flips, each time the operand is read: 0, or from 2^-50 to 1"
    )
    p_exp: Probability | None = Field(
        default=None, description="instead of p, for the sign and exponent bits of a floating-point operand; null: as p"
    )
    p_frac: Probability | None = Field(
        default=None, description="instead of p, for the fraction bits of a floating-point operand; null: as p"
    )
    zero_out: float | None = Field(
        default=None,
        ge=0,
        description="zero-out threshold t, at least 0: after the flips, floating-point values that are not |x| < t, "
        "NaN and infinity among them, become 0; null: no guard",
    )
    bits: Bits = added(
        {},
        "instead of all the above probabilities, for single bits: {bit: p}; bit 0 is the least significant one, of an "
        "fp32 operand 31 is the sign and 30 to 23 the exponent, of bf16 15 and 14 to 7, of fp16 15 and 14 to 10",
    )

    @model_validator(mode="after")
    def _count_probabilities(self) -> Operand:
        if len({*self.bits.values(), self.p, self.p_exp, self.p_frac}) > _MOST:
            raise ValueError(f"bits: more than {_MOST - 3} different probabilities in one operand")
        return self

    @property
    def acts(self) -> bool:
        """Whether it can change any value."""
        return self.zero_out is not None or any(self.transient())

    def transient(self) -> list[float]:
        """All probabilities that are drawn anew at each read."""
        return [p for p in (self.p, self.p_exp, self.p_frac, *self.bits.values()) if p is not None]


class Memory(Operand):
    """What happens to an operand that stays in its memory: beside transient flips, bits that are stuck for good."""

    stuck_at_0: Probability = added(
        default=0.0,
        description="probability that a bit of the memory always reads as 0; drawn once for a chip, by chip_seed",
    )
    stuck_at_1: Probability = added(
        default=0.0, description="probability that a bit always reads as 1; stuck_at_0 + stuck_at_1 is at most 1"
    )

    @model_validator(mode="after")
    def _check_stuck(self) -> Memory:
        if self.stuck_at_0 + self.stuck_at_1 > 1:
            raise ValueError(f"stuck_at_0 + stuck_at_1 is {self.stuck_at_0 + self.stuck_at_1}; allowed is at most 1")
        return self

    @property
    def is_stuck(self) -> bool:
        """Whether some of its bits can be stuck."""
        return self.stuck_at_0 + self.stuck_at_1 > 0

    @property
    def acts(self) -> bool:
        """Whether it can change any value."""
        return self.is_stuck or super().acts


class Settings(Base):
    """Random bit flips by operand; `sites` says where, and may change the operands by layer."""

    type: Literal["bitflip"] = "bitflip"
    weight: Memory = Field(
        default_factory=Memory,
        description="the weight of a linear layer: p, p_exp, p_frac, bits, zero_out, stuck_at_0, stuck_at_1",
    )
    input: Operand = Field(
        default_factory=Operand, description="the input of a linear layer: p, p_exp, p_frac, bits, zero_out"
    )
    shared_input: bool = added(
        default=False,
        description="whether query, key and value (and gate and up) read their input from one memory, so that its "
        "faults are drawn once and are the same for them; false: each layer has its own copy and faults",
    )
    chip_seed: int = added(
        default=0,
        ge=0,
        description="seed of the stuck bits: the chip. Another seed is another chip; seed and step change nothing",
    )
    embedding: Memory | None = Field(default=None, description="the table of an embedding; null: left alone")
    left: Operand | None = Field(
        default=None, description="the left operand of an attention product (query; probabilities); null: left alone"
    )
    right: Operand | None = Field(
        default=None, description="the right operand of an attention product (key; value); null: left alone"
    )
    key: Operand | None = Field(
        default=None, description="keys as attention reads them from the KV cache; null: left alone"
    )
    value: Operand | None = Field(default=None, description="values as attention reads them; null: left alone")
    sites: SitePatterns = LAYERS

    @model_validator(mode="after")
    def _check_overrides(self) -> Settings:
        for pattern, overrides in self.sites:
            try:
                self.at(overrides or {})
            except ValidationError as error:
                raise _at_pattern(pattern, error) from None
        return self

    def _everywhere(self) -> list[Settings]:
        return [self, *(self.at(overrides) for _, overrides in self.sites if overrides)]

    def kinds(self) -> frozenset[str]:
        """The kinds of sites for which some pattern names an operand."""
        return frozenset(
            kind
            for kind, operands in OPERANDS.items()
            if any(
                getattr(settings, field) is not None for settings in self._everywhere() for field in operands.values()
            )
        )

    @property
    def random_faults(self) -> bool:
        """Whether an evaluation must be repeated over fault seeds: not if all faults are stuck, sure or impossible."""
        operands = (
            operand
            for settings in self._everywhere()
            for kind in OPERANDS
            for operand in settings.operands(kind).values()
        )
        return any(0 < p < 1 for operand in operands for p in operand.transient())

    def at(self, overrides: dict[str, Any]) -> Settings:
        """These settings with a pattern's overrides laid over them."""
        if not overrides:
            return self
        return Settings.model_validate(merge(self.model_dump(exclude={"sites"}), overrides))

    def operands(self, kind: str) -> dict[str, Operand]:
        """The operands that may change at a site of this kind, by role."""
        named = {role: getattr(self, field) for role, field in OPERANDS[kind].items()}
        return {role: operand for role, operand in named.items() if operand is not None and operand.acts}


def _at_pattern(pattern: str, error: ValidationError) -> ValidationError:
    """The first error in the overrides of `pattern`, with its whole path."""
    first = error.errors(include_url=False)[0]
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        names = Memory.model_fields if len(first["loc"]) > 1 else Settings.model_fields
        message = f"unknown key; known are {', '.join(sorted(names))}"
    # The message is an argument and not the template: it may hold braces.
    kind = PydanticCustomError("value_error", "{message}", {"message": message})
    details = InitErrorDetails(type=kind, loc=("sites", pattern, *first["loc"]), input=first["input"])
    return ValidationError.from_exception_data("Settings", [details])
