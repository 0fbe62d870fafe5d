# SPDX-License-Identifier: Apache-2.0
"""The API reference, `crds/README.md`, written from the models."""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from .base import DURATION_PATTERN
from .conditions import ADVICE, Advice
from .job import FedPipeJob
from .node import NODE_ADVICE, FedPipeNode, Fleet
from .rules import IMMUTABLE
from .schema import describe, resolve, set_default

INTRODUCTION = """\
# The API of FedPipe

<!-- Generated from fedpipe_api by `make generate`; edit the models instead. -->

`fedpipe.io/v1alpha1` has two kinds. A [FedPipeJob](#fedpipejob) (`kubectl get fpj`) is one federated
fine-tuning in a namespace. A [FedPipeNode](#fedpipenode) (`kubectl get fpn`) is what one node of the cluster
can carry, as its probe reports it. A [Fleet](#fleet) is a file, not a kind: it plays nodes on one machine for
`fedpipe run` and `fedpipe plan`.

This folder holds the CustomResourceDefinitions (`fedpipe.io_*.yaml`), the Python package `fedpipe_api` that
they are generated from, and numbered samples:

| in `samples/` | shows |
|---|---|
| `01-quickstart.yaml` | a text classifier over four nodes, small enough for a laptop |
| `02-private-tickets.yaml` | private data on a claim per node, early stopping, output to a claim |
| `03-causal-lm.yaml` | a language model trained on prompts and completions |
| `04-suspended.yaml` | a job that waits until it is resumed, with a Pod template and time limits |
| `05-fleet.yaml` | a fleet file with every field |
| `06-quickstart-chat.yaml` | a chat model over four nodes, small enough for a laptop |

- **required** marks fields without a default; – marks fields that stay unset when they are not given.
- **duration** is a text such as `90s`, `20m` or `1h30m` (units `ms`, `s`, `m`, `h`).
- **quantity** is a number of bytes, such as `600Mi`, `16Gi` or `2000000`.
- Every text, list and map has an upper bound. The content of `podTemplate` is left to the API server, up to
  24 levels, 2,000 values and 64 KiB of text; the operator sets the condition `Invalid` on what is beyond.
- The name of a job is a DNS label of at most 63 characters.
"""

REASONS = """
## {title}

What the {speakers} say, and what to do.

| reason | meaning | what to do |
|---|---|---|
"""

COMMON = ("apiVersion", "kind", "metadata")
"""Fields of every kind, which need no telling."""


def reference() -> str:
    """Return the reference as Markdown."""
    text = INTRODUCTION
    seen: set[str] = set()
    for kind in (FedPipeJob, FedPipeNode, Fleet):
        root = kind.model_json_schema(by_alias=True)
        for name in _types(kind.__name__, root, root["$defs"]):
            if name not in seen:
                seen.add(name)
                schema = root if name == kind.__name__ else root["$defs"][name]
                text += "\n" + _section(name, schema, root["$defs"], 2 if schema is root else 3)
    text += _reasons("Reasons of a job", "conditions and Events of a FedPipeJob", ADVICE)
    return text + _reasons("Reasons of a node", "conditions of a FedPipeNode", NODE_ADVICE)


def _reasons(title: str, speakers: str, advice: Mapping[Any, Advice]) -> str:
    rows = (f"| `{reason}` | {entry.meaning} | {entry.action or '–'} |\n" for reason, entry in advice.items())
    return REASONS.format(title=title, speakers=speakers) + "".join(rows)


def _types(name: str, schema: dict[str, Any], definitions: dict[str, Any]) -> Iterator[str]:
    """Yield the names of the object types, each before the types of its fields."""
    yield name
    for field in (schema["properties"][key] for key in schema["properties"] if key not in COMMON):
        for child in _references(field):
            if "properties" in definitions[child]:
                yield from _types(child, definitions[child], definitions)


def _references(field: dict[str, Any]) -> Iterator[str]:
    if "$ref" in field:
        yield field["$ref"].rpartition("/")[2]
    for inner in (*field.get("anyOf", ()), field.get("items")):
        if inner:
            yield from _references(inner)


def _section(name: str, schema: dict[str, Any], definitions: dict[str, Any], level: int) -> str:
    lines = [f"{'#' * level} {name}", "", describe(schema), ""]
    lines += ["| field | type | default | meaning |", "|---|---|---|---|"]
    for field, source in schema["properties"].items():
        if field not in COMMON:
            merged = resolve(source, definitions)
            default = "**required**" if field in schema.get("required", ()) else _default(source)
            meaning = describe(merged) + _bounds(merged)
            lines.append(f"| `{field}` | {_type(source, definitions)} | {default} | {meaning} |")
    return "\n".join([*lines, *_rules(schema.get("x-kubernetes-validations", ()))]) + "\n"


def _rules(rules: Iterable[dict[str, str]]) -> Iterator[str]:
    fixed = []
    for index, rule in enumerate(rules):
        if index == 0:
            yield ""
        blamed = f"`{rule['fieldPath'][1:]}`: " if "fieldPath" in rule else ""
        if rule["message"].endswith(IMMUTABLE):
            fixed.append(blamed.removesuffix(": "))
        else:
            yield f"- {blamed}{rule['message']}"
    if fixed:
        yield f"- {', '.join(fixed)}: {IMMUTABLE}"


def _default(field: dict[str, Any]) -> str:
    default = set_default(field.get("default"))
    if default is None:
        return "–"
    if isinstance(default, dict):
        return "its defaults"
    return f"`{_plain(default)}`"


def _bounds(field: dict[str, Any]) -> str:
    """Return the bounds of a number, such as ` (> 0, ≤ 1)`."""
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    given = [f"{sign} {field[key]:.10g}" for key, sign in signs.items() if key in field]
    return f" ({', '.join(given)})" if given else ""


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _type(field: dict[str, Any], definitions: dict[str, Any]) -> str:
    if "items" in field:
        return f"list of {_type(field['items'], definitions)}"
    for name in _references(field):
        if "properties" in definitions[name]:
            return f"[{name}](#{name.lower()})"
    merged = resolve(field, definitions)
    if "enum" in merged:
        return ", ".join(f"`{value}`" for value in merged["enum"])
    if isinstance(merged.get("additionalProperties"), dict):
        return f"map to {_type(merged['additionalProperties'], definitions)}"
    if merged.get("x-kubernetes-int-or-string"):
        return "quantity"
    is_duration = merged.get("pattern") == DURATION_PATTERN
    return "duration" if is_duration else str(merged.get("format", merged["type"]))
