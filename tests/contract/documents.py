# SPDX-License-Identifier: Apache-2.0
"""Documents drawn from a generated schema."""

from datetime import UTC
from functools import cache
from typing import Any

import yaml
from hypothesis import strategies as st

from kube.controlplane import REPOSITORY

INT64 = 2**63 - 1
LARGE = 1e12
CHARACTERS = st.characters(exclude_categories=["Cs", "Cc"])


@cache
def crd(plural: str) -> dict[str, Any]:
    """Return the generated CustomResourceDefinition, to read only."""
    return yaml.safe_load((REPOSITORY / "crds" / f"fedpipe.io_{plural}.yaml").read_text())


def version(plural: str) -> dict[str, Any]:
    """Return the one version of the generated definition."""
    (only,) = crd(plural)["spec"]["versions"]
    return only


def schema(plural: str) -> dict[str, Any]:
    """Return the OpenAPI schema of a kind."""
    return version(plural)["schema"]["openAPIV3Schema"]


def documents(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Return values that the schema allows; rules across fields are not known here."""
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    return _BY_TYPE[schema["type"]](schema)


def _objects(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    if "additionalProperties" in schema:
        return st.dictionaries(
            st.text(CHARACTERS, min_size=1), documents(schema["additionalProperties"]), max_size=3
        )
    required = schema.get("required", ())
    fields = {name: documents(field) for name, field in schema["properties"].items()}
    return st.fixed_dictionaries(
        {name: field for name, field in fields.items() if name in required},
        optional={name: field for name, field in fields.items() if name not in required},
    )


def _arrays(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    keys = schema.get("x-kubernetes-list-map-keys")
    unique = (lambda item: tuple(item[key] for key in keys)) if keys else None
    return st.lists(
        documents(schema["items"]),
        min_size=schema.get("minItems", 0),
        max_size=min(schema["maxItems"], 2),
        unique_by=unique,
    )


def _texts(schema: dict[str, Any]) -> st.SearchStrategy[str]:
    if schema.get("format") == "date-time":
        return st.datetimes(timezones=st.just(UTC)).map(
            lambda moment: moment.isoformat().replace("+00:00", "Z")
        )
    if "pattern" in schema:
        return st.from_regex(rf"\A{schema['pattern'][1:-1]}\Z").filter(
            lambda text: len(text) <= schema["maxLength"]
        )
    return st.text(CHARACTERS, min_size=schema.get("minLength", 0), max_size=min(schema["maxLength"], 12))


def _numbers(schema: dict[str, Any]) -> st.SearchStrategy[float]:
    return st.floats(
        schema.get("minimum", -LARGE),
        schema.get("maximum", LARGE),
        allow_nan=False,
        allow_infinity=False,
        exclude_min=schema.get("exclusiveMinimum", False),
        exclude_max=schema.get("exclusiveMaximum", False),
    )


_BY_TYPE = {
    "object": _objects,
    "array": _arrays,
    "string": _texts,
    "number": _numbers,
    "integer": lambda schema: st.integers(schema.get("minimum", -INT64), schema.get("maximum", INT64)),
    "boolean": lambda schema: st.booleans(),
}
