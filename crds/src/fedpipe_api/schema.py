# SPDX-License-Identifier: Apache-2.0
"""From pydantic's JSON schema to the structural OpenAPI v3 schema that a CustomResourceDefinition holds."""

import re
from typing import Any

from .base import Model

KEPT = (
    "description",
    "type",
    "format",
    "enum",
    "default",
    "required",
    "pattern",
    "minLength",
    "maxLength",
    "minimum",
    "maximum",
    "minItems",
    "maxItems",
    "maxProperties",
)


def structural(kind: type[Model]) -> dict[str, Any]:
    """Return the schema of a kind: `$ref`s inlined, no nulls, no titles, status without defaults."""
    source = kind.model_json_schema(by_alias=True)
    schema = _convert(source, source["$defs"], defaults=True)
    properties = schema["properties"]
    for field, meaning in (("apiVersion", "Version of the API."), ("kind", "Kind of the object.")):
        properties[field] = {"description": meaning, "type": "string"}
    # The API server knows metadata; a CRD may only narrow its name.
    properties["metadata"] = {
        "type": "object",
        "properties": {"name": properties["metadata"]["properties"]["name"]},
    }
    properties["status"] = _convert(source["properties"]["status"], source["$defs"], defaults=False)
    schema["required"] = [field for field in schema["required"] if field != "metadata"]
    if not schema["required"]:
        del schema["required"]
    return schema


def resolve(schema: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """Return the schema with its reference and its alternative to null merged in; its own words win."""
    while True:
        if "$ref" in schema:
            found = definitions[schema["$ref"].rpartition("/")[2]]
        elif "anyOf" in schema:
            (found,) = (option for option in schema["anyOf"] if option.get("type") != "null")
        else:
            return schema
        schema = found | {key: value for key, value in schema.items() if key not in ("$ref", "anyOf")}


def describe(schema: dict[str, Any]) -> str:
    """Return what a type or field means, as one line without references to the source of a formula."""
    text = " ".join(schema.get("description", "").split())
    return re.sub(r" \(METHOD[^)]*\)", "", text)


def set_default(default: Any) -> Any:
    """Return a default without what stays unset in a manifest: nulls and empty texts, lists and maps."""
    if isinstance(default, dict):
        parts = {key: set_default(value) for key, value in default.items()}
        default = {key: value for key, value in parts.items() if value is not None}
    return None if default in ("", [], {}) else default


def _convert(source: dict[str, Any], definitions: dict[str, Any], *, defaults: bool) -> dict[str, Any]:
    source = resolve(source, definitions)
    schema = {key: source[key] for key in KEPT if key in source}
    if "description" in schema:
        schema["description"] = describe(source)
    if "const" in source:
        schema["enum"] = [source["const"]]
    for bound in ("minimum", "maximum"):
        # OpenAPI 3.0 has a flag where JSON Schema has a second bound.
        exclusive = f"exclusive{bound.capitalize()}"
        if exclusive in source:
            schema |= {bound: source[exclusive], exclusive: True}
    default = set_default(source.get("default"))
    schema.pop("default", None)
    if defaults and default is not None:
        schema["default"] = default
    schema |= {key: value for key, value in source.items() if key.startswith("x-kubernetes-")}
    if "items" in source:
        schema["items"] = _convert(source["items"], definitions, defaults=defaults)
    if "properties" in source:
        schema["properties"] = {
            name: _convert(field, definitions, defaults=defaults)
            for name, field in source["properties"].items()
        }
    elif isinstance(source.get("additionalProperties"), dict):
        values = source["additionalProperties"]
        schema["additionalProperties"] = _convert(values, definitions, defaults=defaults)
    return schema
