# SPDX-License-Identifier: Apache-2.0
"""Rules across the fields of one type, written once for Python and for the API server (CEL)."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic.alias_generators import to_snake


@dataclass(frozen=True)
class Rule:
    """A rule that a type keeps.

    `field` is the camelCase path, below the type, of the field to blame; empty blames the type itself.
    `{a.b}` in the message stands for the value of that field. `holds` takes the model; None is a rule on
    changes (`oldSelf`), which only the API server sees.
    """

    field: str
    message: str
    cel: str
    holds: Callable[[Any], bool] | None = None

    def text(self, model: Any) -> str:
        """Return the message with the values of the given model."""

        def value(match: re.Match[str]) -> str:
            found = model
            for name in match[1].split("."):
                found = getattr(found, to_snake(name))
            return str(found)

        return re.sub(r"\{([\w.]+)\}", value, self.message)

    def to_schema(self) -> dict[str, str]:
        """Return the entry of `x-kubernetes-validations`."""
        schema = {"rule": self.cel, "message": self.message}
        fields = re.findall(r"\{([\w.]+)\}", self.message)
        if fields:
            template = re.sub(r"\{[\w.]+\}", "%d", self.message)
            values = ", ".join(f"self.{field}" for field in fields)
            schema["messageExpression"] = f"'{template}'.format([{values}])"
        schema["reason"] = "FieldValueInvalid" if self.holds else "FieldValueForbidden"
        if self.field:
            schema["fieldPath"] = f".{self.field}"
        return schema


IMMUTABLE = "cannot be changed after creation; create another job instead"


def immutable(*fields: str) -> tuple[Rule, ...]:
    """Return the rules that keep the given fields as they were created."""
    return tuple(
        Rule(
            field=field,
            message=f"{field} {IMMUTABLE}",
            cel=f"has(self.{field}) == has(oldSelf.{field}) && "
            f"(!has(self.{field}) || self.{field} == oldSelf.{field})",
        )
        for field in fields
    )


def inside(field: str) -> Rule:
    """Return the rule that a path stays inside its volume."""

    def holds(model: Any) -> bool:
        path = getattr(model, to_snake(field))
        return path is None or not (path.startswith("/") or "/../" in f"/{path}/")

    return Rule(
        field=field,
        message="leaves the volume; give a relative path without ..",
        cel=f"!has(self.{field}) || "
        f"!(self.{field}.startsWith('/') || ('/' + self.{field} + '/').contains('/../'))",
        holds=holds,
    )


def exactly_one(*fields: str) -> Rule:
    """Return the rule that one of the given optional fields is set, and no other."""
    given = ", ".join(f"has(self.{field})" for field in fields)
    return Rule(
        field="",
        message=f"give exactly one of {', '.join(fields)}",
        cel=f"[{given}].exists_one(given, given)",
        holds=lambda model: sum(getattr(model, to_snake(field)) is not None for field in fields) == 1,
    )


def min_not_above_max() -> Rule:
    """Return the rule that `min` is at most `max`."""
    return Rule(
        field="",
        message="min must not be above max",
        cel="self.min <= self.max",
        holds=lambda model: model.min <= model.max,
    )
