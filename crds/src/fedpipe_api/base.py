# SPDX-License-Identifier: Apache-2.0
"""The base of every model on the wire or in the cluster, and the types they share."""

import re
from collections.abc import Iterable
from datetime import date, datetime
from fractions import Fraction
from typing import Annotated, Any, ClassVar, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    PlainSerializer,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)
from pydantic.alias_generators import to_camel
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

from .rules import Rule


class UserError(Exception):
    """A mistake the user can fix: one line that names the field, file or node and what to do."""


USER_MISTAKE = 2
"""Exit status of a program that ends with a UserError."""


class Model(BaseModel):
    """A frozen camelCase model that refuses unknown fields and keeps its `rules`."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        # JSON has neither NaN nor infinity: their literals and numbers that overflow are refused.
        allow_inf_nan=False,
        alias_generator=to_camel,
        populate_by_name=True,
        # Field names such as `model` and `model_shape` are ours, not pydantic's.
        protected_namespaces=(),
    )
    rules: ClassVar[tuple[Rule, ...]] = ()

    @model_validator(mode="after")
    def _keep_rules(self) -> Self:
        for rule in self.rules:
            if rule.holds is not None and not rule.holds(self):
                context = {"field": rule.field, "message": rule.text(self)}
                raise PydanticCustomError("rule", "{message}", context)
        return self

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Return pydantic's schema with the rules as `x-kubernetes-validations`."""
        reference = handler(core)
        schema = handler.resolve_ref_schema(reference)
        if cls.rules:
            schema["x-kubernetes-validations"] = [rule.to_schema() for rule in cls.rules]
        return reference

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:
        """Read a document as the API server would: camelCase names only, durations as text."""
        return super().model_validate(obj, **(_AS_DOCUMENT | options))

    @classmethod
    def model_validate_json(cls, json_data: str | bytes | bytearray, **options: Any) -> Self:
        """Read JSON text as `model_validate` reads a document."""
        return super().model_validate_json(json_data, **(_AS_DOCUMENT | options))

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON-ready camelCase form; unset optional fields are left out."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)

    def to_json(self) -> str:
        """Return `to_dict` as JSON text."""
        return self.model_dump_json(by_alias=True, exclude_none=True)


# The context separates what comes from a manifest or the wire from what Python builds.
_AS_DOCUMENT: dict[str, Any] = {"by_name": False, "by_alias": True, "context": {"document": True}}


_PLAIN = {
    "missing": "required, but not given",
    "model_type": "must be a mapping of fields to values",
    "dict_type": "must be a mapping",
    "tuple_type": "must be a list",
    "list_type": "must be a list",
}
"""What pydantic says in Python's words, by the type of the fault."""

_UNQUOTED = {
    bool: "true or false (YAML reads yes, no, on and off so too)",
    int: "a number",
    float: "a number",
    date: "a date",
    datetime: "a date",
    type(None): "null",
}
"""What YAML makes of words without quotes, by the type of the value."""

_LONGEST_NAME = 256


def given_twice(names: Iterable[str]) -> str | None:
    """Return the first name that came before, or None."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def explain(error: ValidationError, prefix: str = "") -> str:
    """Return the first fault of a validation error as `field.path: what is wrong`."""
    fault = error.errors(include_url=False)[0]
    path = prefix
    for part in fault["loc"]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not part.startswith("function-"):
            shown = _shown(part)
            path += f".{shown}" if path else shown
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "rule" and fault["ctx"]["field"]:
        path += f".{fault['ctx']['field']}" if path else fault["ctx"]["field"]
    elif fault["type"] == "extra_forbidden":
        message = "unknown field; check its spelling or remove it"
    elif fault["type"] in _PLAIN:
        message = _PLAIN[fault["type"]]
    elif fault["type"] == "string_type" and (kind := _UNQUOTED.get(type(fault["input"]))):
        message = f"must be text, but is {kind}; put it in quotes"
    elif fault["type"] == "too_short":
        message = f"must have at least {fault['ctx']['min_length']}"
    return f"{path}: {message}" if path else message


def _shown(name: str) -> str:
    """Return the name of a field as a line can hold it: the sender may have chosen it."""
    shown = name if name.isprintable() else ascii(name)[1:-1]
    return shown if len(shown) <= _LONGEST_NAME else f"{shown[:_LONGEST_NAME]}…"


def keyed(*keys: str) -> dict[str, Any]:
    """Return the schema of a list that the API server merges by the given keys."""
    return {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": list(keys)}


_DURATION_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
DURATION_PATTERN = r"^([0-9]+(\.[0-9]+)?(ms|s|m|h))+$"
_DURATION_LENGTH = 32


def parse_duration(value: object) -> float:
    """Return the seconds in a Kubernetes duration such as `20m` or `1h30m`; numbers are seconds."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if not (
        isinstance(value, str)
        and len(value) <= _DURATION_LENGTH
        and re.fullmatch(DURATION_PATTERN[1:-1], value)
    ):
        raise ValueError(f"{value!r} is not a duration; write it like 90s, 20m or 1h30m")
    return sum(
        float(number) * _DURATION_UNITS[unit]
        for number, unit in re.findall(r"([0-9]+(?:\.[0-9]+)?)(ms|s|m|h)", value)
    )


def _duration(value: object, info: ValidationInfo) -> float:
    if info.context == _AS_DOCUMENT["context"] and not isinstance(value, str):
        raise ValueError(f"{value!r} is not a duration; write it like 90s, 20m or 1h30m")
    return parse_duration(value)


def format_duration(seconds: float) -> str:
    """Return the duration for the given seconds, to the millisecond, each unit at most once: `1h30m`."""
    rest = round(seconds * 1000)
    text = ""
    for unit, size in (("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)):
        count, rest = divmod(rest, size)
        if count:
            text += f"{count}{unit}"
    return text or "0s"


_QUANTITY_UNITS = {
    "": 1,
    "k": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "Ki": 2**10,
    "Mi": 2**20,
    "Gi": 2**30,
    "Ti": 2**40,
}
QUANTITY_PATTERN = r"^[0-9]+(\.[0-9]+)?(k|M|G|T|Ki|Mi|Gi|Ti)?$"


def parse_quantity(value: object) -> int:
    """Return the bytes in a Kubernetes quantity such as `600Mi`; integers are bytes."""
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 0:
            raise ValueError(f"{value} is negative; write a number of bytes such as 600Mi")
        return value
    match = re.fullmatch(QUANTITY_PATTERN[1:-1], value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f"{value!r} is not a size; write it like 600Mi, 16Gi or 2000000")
    unit = match.group(2) or ""
    return int(Fraction(match.group().removesuffix(unit)) * _QUANTITY_UNITS[unit])


Duration = Annotated[
    float,
    BeforeValidator(_duration),
    PlainSerializer(format_duration, return_type=str),
    WithJsonSchema({"type": "string", "pattern": DURATION_PATTERN, "maxLength": _DURATION_LENGTH}),
]
"""Seconds; written in manifests as a Kubernetes duration."""

Quantity = Annotated[
    int,
    BeforeValidator(parse_quantity),
    WithJsonSchema({"x-kubernetes-int-or-string": True, "pattern": QUANTITY_PATTERN}),
]
"""Bytes; written in manifests as a Kubernetes quantity."""

Name = Annotated[str, StringConstraints(min_length=1, max_length=253)]
ModuleName = Annotated[str, StringConstraints(min_length=1, max_length=256)]


def _one_line(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text)


Word = Annotated[str, StringConstraints(max_length=64), AfterValidator(_one_line)]
Text = Annotated[str, StringConstraints(max_length=1024), AfterValidator(_one_line)]
"""One line for people; what would break the line, or a terminal, becomes a blank."""
Sha256 = Annotated[str, StringConstraints(min_length=64, max_length=64, pattern=r"^[0-9a-f]{64}$")]

# Every number from the wire has one of these types, so that none overflows in a sum, a float or a database.
Count = Annotated[int, Field(ge=0, le=2**53)]
"""How many of something; a float holds every whole number up to its bound."""
Positive = Annotated[int, Field(ge=1, le=2**53)]
"""How many of something that there is."""
Bytes = Annotated[int, Field(ge=0, le=2**53)]
RoundNumber = Annotated[int, Field(ge=0, le=999_999)]
NANOSECOND = 1e-9
Seconds = Annotated[float, Field(ge=0, le=1e9), AfterValidator(lambda s: s if s >= NANOSECOND else 0.0)]
"""A duration, at most 31 years; less than a nanosecond is none, so that any other can be divided by."""
Moment = Annotated[float, Field(ge=0, le=253_402_300_799)]
"""Seconds since the epoch, at most the last of the year 9999."""
Loss = Annotated[float, Field(ge=-1e9, le=1e9)]
"""Mean loss of a target (natural log)."""
Score = Annotated[float, Field(ge=0, le=1e30)]
"""Importance of a weight matrix; sums over nodes and matrices stay finite."""
Figure = Annotated[float, Field(ge=0, le=1e300)]
"""A norm, a ratio or another figure that is not negative and whose square root is all that is taken."""
