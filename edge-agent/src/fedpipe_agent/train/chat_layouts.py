# SPDX-License-Identifier: Apache-2.0
"""Conversations of the layouts that people have, as the messages that chat templates take."""

import json
from typing import Any

from fedpipe_api.base import UserError
from fedpipe_api.rows import Row

Message = dict[str, Any]

_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
_DEPTH = 32
"""Deepest nesting of a message."""

KINDS = {
    type(None): "null",
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "an object",
}
"""What a person calls the types of values; others are called by their type's name."""


def kind_of(value: object) -> str:
    """Return what a person calls a value's type."""
    return KINDS.get(type(value), type(value).__name__)


def lookup(row: Row, field: str) -> object:
    """Return a field's value, found by its name, as a path of nested fields, or by its name in another case.

    Raises:
        KeyError: there is none.
        UserError: several have the name in another case.
    """
    if field in row.fields:
        return row.fields[field]
    value: Any = row.fields
    for part in field.split("."):
        if not isinstance(value, dict) or part not in value:
            break
        value = value[part]
    else:
        return value
    alike = [name for name in row.fields if isinstance(name, str) and name.casefold() == field.casefold()]
    if len(alike) > 1:
        raise UserError(f"{row.place}: several fields are called {field!r} but for their case; rename one")
    return row.fields[alike[0]] if alike else row.fields[field]


def has(row: Row, field: str) -> bool:
    """Return whether a row has a field that is not null."""
    try:
        return lookup(row, field) is not None
    except KeyError:
        return False


def value_of(row: Row, field: str) -> object:
    """Return a field's value, which is not null.

    Raises:
        UserError: there is no such field, or it is null.
    """
    try:
        value = lookup(row, field)
    except KeyError:
        raise UserError(f"{row.place}: no field {field!r}; add it or correct spec.data.fields") from None
    if value is None:
        raise UserError(f"{row.place}: field {field!r} is null; give it a value or remove the row")
    return value


def text_of(row: Row, field: str) -> str:
    """Return a field that is text.

    Raises:
        UserError: it is missing, of another type, or no tokenizer takes it.
    """
    value = value_of(row, field)
    if not isinstance(value, str):
        raise UserError(f"{row.place}: field {field!r} is {kind_of(value)}, not text; write a string")
    check_text(row, field, value)
    return value


def check_text(row: Row, field: str, value: str) -> None:
    """Raise UserError where JSON escaped half a surrogate pair, which no tokenizer takes."""
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            what = f"{row.place}: field {field!r} holds half a surrogate pair"
            raise UserError(f"{what}; fix or remove the row") from None


def optional_text(row: Row, field: str) -> str:
    """Return a field that is text; empty where there is none."""
    return text_of(row, field) if has(row, field) else ""


def messages_of(row: Row, field: str) -> list[Message]:
    """Return a field's messages, each with a role and content, tool calls or both.

    Raises:
        UserError: it is no list of messages, or one is wrong.
    """
    return [_message(row, f"{field}[{i}]", one) for i, one in enumerate(_list(row, field))]


def sharegpt(row: Row, field: str) -> list[Message]:
    """Return the messages of a row of ShareGPT: turns `from` and `value`, and perhaps a field `system`.

    Raises:
        UserError: it is no list of turns, or one is wrong.
    """
    found = [_turn(row, f"{field}[{i}]", one) for i, one in enumerate(_list(row, field))]
    system = optional_text(row, "system")
    return [{"role": "system", "content": system}, *found] if system else found


def alpaca(row: Row) -> tuple[str, str, str, str]:
    """Return system, instruction, input and output of a row of Alpaca; system and input may be empty.

    Raises:
        UserError: a field is missing or wrong.
    """
    if has(row, "history") and value_of(row, "history"):
        raise UserError(f"{row.place}: field 'history' is not read; write the conversation as messages")
    return (
        optional_text(row, "system"),
        text_of(row, "instruction"),
        optional_text(row, "input").strip(),
        text_of(row, "output"),
    )


def tools_of(row: Row, field: str) -> list[Any] | None:
    """Return the functions that a conversation may call, a list or JSON text of one; None without.

    Raises:
        UserError: the field is something else.
    """
    if not has(row, field):
        return None
    value = value_of(row, field)
    if value == "":
        return None
    tools = [_without_null(row, field, tool) for tool in _list(row, field)]
    if not all(isinstance(tool, dict) and isinstance(tool.get("function", tool), dict) for tool in tools):
        raise UserError(f"{row.place}: field {field!r} is not a list of functions; correct it")
    return tools or None


def _list(row: Row, field: str) -> list[Any]:
    value = value_of(row, field)
    if isinstance(value, str):  # cells of CSV and Parquet may hold a list as JSON
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise UserError(f"{row.place}: field {field!r} is text, not a list of messages") from None
    if isinstance(value, dict) and value and all(isinstance(one, list) for one in value.values()):
        columns = list(value.values())  # the library datasets keeps a list of objects as its columns
        if len({len(column) for column in columns}) == 1:
            value = [dict(zip(value, cells, strict=True)) for cells in zip(*columns, strict=True)]
    if not isinstance(value, list):
        raise UserError(f"{row.place}: field {field!r} is {kind_of(value)}, not a list of messages")
    return value


def _message(row: Row, name: str, value: object) -> Message:
    if not isinstance(value, dict):
        raise UserError(
            f"{row.place}: field {name!r} is {kind_of(value)}, not a message with role and content"
        )
    message: Message = _without_null(row, name, value)
    role = message.get("role")
    if not isinstance(role, str) or not role:
        where = "; is the layout spec.data.format sharegpt?" if "from" in message else "; name who speaks"
        raise UserError(f"{row.place}: field {name + '.role'!r} is missing or not text{where}")
    content = message.get("content")
    if isinstance(content, list):
        message["content"] = content = _parts(row, f"{name}.content", content)
    if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        raise UserError(f"{row.place}: field {name + '.content'!r} is {kind_of(content)}, not text")
    for number, call in enumerate(message.get("tool_calls") or ()):
        _parse_arguments(row, f"{name}.tool_calls[{number}]", call)
    return message


def _parts(row: Row, name: str, parts: list[Any]) -> str:
    """Return the text of a message that is written in parts."""
    for part in parts:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            raise UserError(
                f"{row.place}: field {name!r} holds something else than text; only text is learned"
            )
    return "".join(part["text"] for part in parts)


def _parse_arguments(row: Row, name: str, call: object) -> None:
    """Replace arguments that are JSON text, as some services write them, by what templates write as JSON."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UserError(f"{row.place}: field {name!r} is not a call of a function with name and arguments")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            function["arguments"] = json.loads(arguments)
        except (ValueError, RecursionError):
            raise UserError(f"{row.place}: field {name + '.arguments'!r} is not JSON; correct it") from None


def _turn(row: Row, name: str, value: object) -> Message:
    if not isinstance(value, dict) or not isinstance(value.get("from"), str):
        raise UserError(f"{row.place}: field {name + '.from'!r} is missing or not text; name who speaks")
    text = value.get("value")
    if not isinstance(text, str):
        raise UserError(f"{row.place}: field {name + '.value'!r} is {kind_of(text)}, not text")
    check_text(row, f"{name}.value", text)
    speaker = value["from"].casefold()
    if speaker == "function_call":
        try:
            call = json.loads(text)
        except (ValueError, RecursionError):
            raise UserError(f"{row.place}: field {name + '.value'!r} is not JSON; correct it") from None
        calls = call if isinstance(call, list) else [call]
        message = {
            "role": "assistant",
            "tool_calls": [{"type": "function", "function": one} for one in calls],
        }
        return _message(row, name, message)
    if speaker not in _SHAREGPT_ROLES:
        roles = ", ".join([*_SHAREGPT_ROLES, "function_call"])
        raise UserError(f"{row.place}: field {name + '.from'!r} is not one of {roles}")
    return {"role": _SHAREGPT_ROLES[speaker], "content": text}


def _without_null(row: Row, name: str, value: Any, depth: int = 0) -> Any:
    """Return a value without null fields: columns give every message the fields of all others."""
    if depth > _DEPTH:
        raise UserError(f"{row.place}: field {name!r} is nested too deep")
    if isinstance(value, dict):
        return {
            key: _without_null(row, name, one, depth + 1) for key, one in value.items() if one is not None
        }
    if isinstance(value, list):
        return [_without_null(row, name, one, depth + 1) for one in value]
    if isinstance(value, str):
        check_text(row, name, value)
    return value
