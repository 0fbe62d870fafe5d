# SPDX-License-Identifier: Apache-2.0
"""What comes from the wire or stands in the ledger is finite and bounded, whatever it is."""

import inspect
import time
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import Field

from fedpipe_api import wire
from fedpipe_api.base import Model
from fedpipe_api.wire import (
    REGISTRATION_LIMIT,
    BadMessage,
    Evaluation,
    ProfileReport,
    Progress,
    Registration,
    read_message,
)
from fedpipe_operator.engine import records
from standins.agents import model_shape, registration

MODELS = sorted(
    {
        kind
        for module in (wire, records)
        for _, kind in inspect.getmembers(module, inspect.isclass)
        if issubclass(kind, Model) and kind is not Model
    },
    key=lambda kind: kind.__name__,
)

OPEN = ("podTemplate", "matchLabels")
"""Parts of a job's spec whose size has rules of its own."""


def unbounded(schema: dict[str, Any], definitions: dict[str, Any], path: str) -> Iterator[str]:
    """Yield the path of every number, text, list and map that could grow without bound."""
    if path.endswith(OPEN):
        return
    if "$ref" in schema:
        schema = definitions[schema["$ref"].rpartition("/")[2]] | {
            k: schema[k] for k in schema if k != "$ref"
        }
    for option in (*schema.get("anyOf", ()), *schema.get("oneOf", ())):
        yield from unbounded(option, definitions, path)
    match schema.get("type"):
        case "integer" | "number":
            low = "minimum" in schema or "exclusiveMinimum" in schema
            high = "maximum" in schema or "exclusiveMaximum" in schema
            if not (low and high) and "enum" not in schema and "const" not in schema:
                yield path
        case "string":
            fixed = "enum" in schema or "const" in schema or schema.get("format") == "date-time"
            if not fixed and "maxLength" not in schema:
                yield path
        case "array":
            if "maxItems" not in schema:
                yield path
            yield from unbounded(schema.get("items", {}), definitions, f"{path}[]")
        case "object" if "properties" in schema:
            for name, field in schema["properties"].items():
                yield from unbounded(field, definitions, f"{path}.{name}")
        case "object":
            if "maxProperties" not in schema or "maxLength" not in schema.get("propertyNames", {}):
                yield path
            yield from unbounded(schema.get("additionalProperties", {}), definitions, f"{path}{{}}")


def test_the_walk_finds_what_is_unbounded() -> None:
    class Loose(Model):
        count: int = 0
        share: float = 0.0
        text: str = ""
        several: tuple[int, ...] = ()
        named: dict[str, float] = Field(default_factory=dict)

    found = Loose.model_json_schema()
    assert set(unbounded(found, {}, "x")) == {
        "x.count", "x.share", "x.text", "x.several", "x.several[]", "x.named", "x.named{}",
    }  # fmt: skip


@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
def test_every_field_of_wire_and_ledger_is_bounded(kind: type[Model]) -> None:
    schema = kind.model_json_schema(by_alias=True)
    assert list(unbounded(schema, schema.get("$defs", {}), kind.__name__)) == []


def changed(message: Model, old: str, new: str) -> str:
    text = message.to_json()
    assert text.count(old) == 1
    return text.replace(old, new)


HUGE = "1" + "0" * 400
GOOD = registration(model_shape())
BAD = {
    "speed Infinity": (Registration, changed(GOOD, '"speed":1.0', '"speed":Infinity'), "device.speed: "),
    "speed 1e999": (Registration, changed(GOOD, '"speed":1.0', '"speed":1e999'), "device.speed: "),
    "speed NaN": (Registration, changed(GOOD, '"speed":1.0', '"speed":NaN'), "device.speed: "),
    "samples 10^400": (Registration, changed(GOOD, '"samples":100', f'"samples":{HUGE}'), "samples: "),
    "10^7 rows": (
        Registration,
        GOOD.to_json().replace('"rows":16', '"rows":10000000'),
        "model.matrices[0].rows: ",
    ),
    "a matrix larger than the model": (
        Registration,
        GOOD.to_json().replace('"rows":16', '"rows":1000000'),
        "model.matrices: together larger than the model has parameters",
    ),
    "a matrix twice": (
        Registration,
        GOOD.to_json().replace("encoder.1.query", "encoder.0.query"),
        "model.matrices: a name is given twice",
    ),
    "two kernels of a precision": (
        Registration,
        changed(GOOD, '"precision":"bf16"', '"precision":"fp32"'),
        "device.kernels: a precision is given twice",
    ),
    "a matrix named as the head": (
        Registration,
        GOOD.to_json().replace("encoder.1.query", "head.query"),
        "model.matrices: a name begins with 'head.'",
    ),
    "a head of 2^60": (
        Registration,
        changed(GOOD, '"shape":[3,12]', '"shape":[1048576,1048576,1048576]'),
        "model.head: ",
    ),
    "a negative side": (Registration, changed(GOOD, '"shape":[3,12]', '"shape":[-3,12]'), "model.head[0]"),
    "tokens 10^400": (
        Evaluation,
        f'{{"round":0,"samples":1,"tokens":{HUGE},"lossSum":1,"precision":"fp32"}}',
        "tokens: ",
    ),
    "step 10^400": (
        Progress,
        f'{{"kind":"train","round":1,"state":"training","step":{HUGE}}}',
        "step: ",
    ),
    "loss -Infinity": (
        Progress,
        '{"kind":"train","round":1,"state":"training","loss":-Infinity}',
        "loss: ",
    ),
    "deep nesting": (Progress, '{"kind":' + "[" * 30_000 + "]" * 30_000 + "}", "Invalid JSON"),
    "a name twice": (
        Progress,
        '{"kind":"train","round":1,"round":2,"state":"training"}',
        "round: given twice; send it once",
    ),
    "a field that breaks the line": (
        Progress,
        '{"kind":"train","round":1,"state":"training","x\\nADMIN \\u001b[31m":1}',
        "x\\nADMIN \\x1b[31m: unknown",
    ),
    "no UTF-8": (Progress, b'{"kind":"\xff"}', ""),
    "half a surrogate": (Progress, '{"\\ud800":1}', "Invalid JSON"),
    "5000 digits": (Progress, f'{{"step":1{"0" * 5000}}}', "Invalid JSON"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_message_is_refused_in_one_line(case: str) -> None:
    kind, body, wanted = BAD[case]
    with pytest.raises(BadMessage) as caught:
        read_message(kind, body)
    line = str(caught.value)
    assert wanted in line
    assert line.isprintable()
    assert len(line) < 1024


def test_text_for_people_stays_one_line() -> None:
    sent = '{"kind":"train","round":1,"state":"failed","message":"out\\n2026 ERROR forged\\u001b[2J"}'
    message = read_message(Progress, sent).message
    assert message == "out 2026 ERROR forged [2J"


def test_a_message_with_many_names_given_twice_is_refused_at_once() -> None:
    names = [f"k{number:05}" for number in range(10_000)] + ["k09999"] * 50_000
    scores = ",".join(f'"{name}":1' for name in names)
    body = f'{{"stepSeconds":1,"peakBytes":1,"microBatch":1,"scores":{{{scores}}}}}'
    assert len(body) < REGISTRATION_LIMIT
    started = time.process_time()
    with pytest.raises(BadMessage, match="k09999: given twice"):
        read_message(ProfileReport, body)
    assert time.process_time() - started < 1, "the event loop of all jobs waits meanwhile"
