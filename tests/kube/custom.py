# SPDX-License-Identifier: Apache-2.0
"""What the API server does with a custom resource: prunes, fills in defaults, validates by schema, list types and CEL.

The schema is checked by jsonschema, the rules by the CEL that Google maintains. Two things are simpler than in the
API server: a set in a rule is compared in order, and formats (dates) are not checked.
"""

import re
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from typing import Any, NamedTuple

from cel_expr_python import cel
from cel_expr_python.ext import ext_optional, ext_strings
from jsonschema import Draft4Validator, ValidationError, validators

Document = dict[str, Any]
Schema = dict[str, Any]
EXTENSIONS = (ext_strings.ExtStrings(), ext_optional.ExtOptional())
WORDS = {
    "FieldValueInvalid": "Invalid value",
    "FieldValueForbidden": "Forbidden",
    "FieldValueRequired": "Required value",
    "FieldValueDuplicate": "Duplicate value",
}


class Cause(NamedTuple):
    """Why an object is refused: the field's path, a reason of Kubernetes, and the message."""

    field: str
    reason: str
    message: str

    def __str__(self) -> str:
        return f"{self.field}: {WORDS[self.reason]}: {self.message}"

    def to_dict(self) -> dict[str, str]:
        """Return the cause as it is in a Status."""
        return {
            "field": self.field,
            "reason": self.reason,
            "message": f"{WORDS[self.reason]}: {self.message}",
        }


def pruned(schema: Schema, document: Document) -> tuple[Document, list[str]]:
    """Return the document without the fields that the schema does not know, and the paths of those."""
    unknown: list[str] = []
    kept = _pruned(schema, {k: v for k, v in document.items() if k != "metadata"}, "", unknown)
    return kept | ({"metadata": document["metadata"]} if "metadata" in document else {}), unknown


def _pruned(schema: Schema, value: Any, path: str, unknown: list[str]) -> Any:
    if schema.get("x-kubernetes-preserve-unknown-fields"):
        return value
    if isinstance(value, list):
        return [
            _pruned(schema.get("items", {}), item, f"{path}[{i}]", unknown) for i, item in enumerate(value)
        ]
    if not isinstance(value, dict) or "properties" not in schema:
        return value
    kept = {}
    for name, item in value.items():
        below = f"{path}.{name}".removeprefix(".")
        if name in schema["properties"]:
            kept[name] = _pruned(schema["properties"][name], item, below, unknown)
        else:
            unknown.append(below)
    return kept


def fill(schema: Schema, value: Any) -> None:
    """Set every default that the schema has for a field that is not there, in place."""
    if isinstance(value, list):
        for item in value:
            fill(schema.get("items", {}), item)
    elif isinstance(value, dict):
        for name, field in schema.get("properties", {}).items():
            if value.get(name) is None and "default" in field:
                value[name] = deepcopy(field["default"])
            if name in value:
                fill(field, value[name])


def causes(schema: Schema, new: Document, old: Document | None) -> list[Cause]:
    """Return why the API server refuses an object, or the change of the old one; empty if it does not.

    As there, rules are evaluated only for what the schema allows.
    """
    found = [cause for error in _Validator(schema).iter_errors(new) for cause in _of_schema(error)]
    found += _duplicates(schema, new, "")
    return found or list(_broken(schema, new, old, ""))


def _pattern(_: Any, pattern: str, value: Any, __: Any) -> Iterator[ValidationError]:
    # Go's $ is the end of the text; Python's comes before a last end of line too.
    if isinstance(value, str) and not re.search(re.sub(r"\$$", r"\\Z", pattern), value):
        yield ValidationError(f"{value!r} does not match {pattern!r}")


_Validator = validators.extend(Draft4Validator, {"pattern": _pattern})


def _of_schema(error: ValidationError) -> Iterator[Cause]:
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.absolute_path)[1:]
    if error.validator == "required":
        name = re.match("'(.*)' is a required property", error.message)
        assert name is not None
        yield Cause(f"{path}.{name[1]}".removeprefix("."), "FieldValueRequired", "")
    else:
        yield Cause(path, "FieldValueInvalid", error.message)


def _children(schema: Schema, value: Any, old: Any) -> Iterator[tuple[Schema, Any, Any, str]]:
    """Yield the parts of a value: schema, value, old value (None where there is none to compare), path."""
    if isinstance(value, dict):
        before = old if isinstance(old, dict) else {}
        for name, item in value.items():
            below = schema.get("properties", {}).get(name) or schema.get("additionalProperties")
            if isinstance(below, dict):
                yield below, item, before.get(name), f".{name}"
    elif isinstance(value, list) and "items" in schema:
        keys = schema.get("x-kubernetes-list-map-keys")
        earlier = {_key(item, keys): item for item in old or ()} if keys else {}
        for number, item in enumerate(value):
            yield schema["items"], item, earlier.get(_key(item, keys)) if keys else None, f"[{number}]"


def _key(item: Document, keys: list[str]) -> tuple[Any, ...]:
    return tuple(item.get(key) for key in keys)


def _duplicates(schema: Schema, value: Any, path: str) -> Iterator[Cause]:
    kind = schema.get("x-kubernetes-list-type")
    if kind in ("map", "set") and isinstance(value, list):
        seen: list[Any] = []
        for number, item in enumerate(value):
            if kind == "map" and not isinstance(item, dict):
                continue
            key = item if kind == "set" else _key(item, schema["x-kubernetes-list-map-keys"])
            if key in seen:
                yield Cause(f"{path}[{number}]".removeprefix("."), "FieldValueDuplicate", f"{key}")
            seen.append(key)
    for below, item, _, name in _children(schema, value, None):
        yield from _duplicates(below, item, path + name)


def _broken(schema: Schema, value: Any, old: Any, path: str) -> Iterator[Cause]:
    for rule in schema.get("x-kubernetes-validations", ()):
        assert "optionalOldSelf" not in rule, "not imitated here yet"
        if "oldSelf" in rule["rule"] and old is None:
            continue
        given = {"self": value, "oldSelf": old}
        if evaluate(rule["rule"], given) is not True:
            message = (
                evaluate(rule["messageExpression"], given) if "messageExpression" in rule else rule["message"]
            )
            yield Cause((path + rule.get("fieldPath", "")).removeprefix("."), rule["reason"], message)
    for below, item, before, name in _children(schema, value, old):
        yield from _broken(below, item, before, path + name)


def evaluate(expression: str, variables: dict[str, Any]) -> Any:
    """Return the value of a CEL expression over JSON values; an error of the evaluation is returned as its text."""
    result = _compiled(expression, tuple(variables)).eval(data=variables)
    return str(result.value()) if result.type() == cel.Type.ERROR else result.plain_value()


@cache
def _compiled(expression: str, names: tuple[str, ...]) -> cel.Expression:
    environment = cel.NewEnv(
        variables=dict.fromkeys(names, cel.Type.DYN),
        extensions=EXTENSIONS,
    )
    return environment.compile(expression)
