# SPDX-License-Identifier: Apache-2.0
"""Rows of JSON: one object a line, or an array of objects, read piece by piece."""

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..base import UserError
from .row import BadRow, Row, fault_of
from .text_encoding import LINE_LIMIT, Lines, encoding_of

_CHUNK = 2**20
"""Characters of an array that are read together."""
_BLANK = re.compile(r"[ \t\r\n]*")


class _Objects:
    """Decodes JSON; `twice` says whether an object had a name twice, of which Python keeps the last."""

    def __init__(self) -> None:
        self.twice = False
        self.decoder = json.JSONDecoder(object_pairs_hook=self._object)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        self.twice = self.twice or len(fields) < len(pairs)
        return fields

    def check(self, place: str, row: object) -> str | None:
        """Return what is wrong with a decoded row."""
        twice, self.twice = self.twice, False
        if not isinstance(row, dict):
            return f"{place}: not a JSON object; write one {{...}} per line, or an array of them"
        return f"{place}: two fields have the same name; remove one" if twice else None


def json_lines(path: Path, lines: Lines, bad: BadRow) -> Iterator[Row]:
    """Yield the rows of JSON Lines; see `read`."""
    objects = _Objects()
    for line in lines:
        text = line.strip(" \t\r\n")
        place = f"{path}:{lines.number}"
        if not text:
            continue
        fault, lines.fault = lines.fault, None
        row: Any = None
        if not fault:
            try:
                row = objects.decoder.decode(text)
            except (ValueError, RecursionError) as error:
                fault = fault_of(error)
        if fault:
            bad(UserError(f"{place}: not a JSON object: {fault}; fix or remove the line"))
        elif wrong := objects.check(place, row):
            bad(UserError(wrong))
        else:
            yield Row(place, row, text)
            continue
        objects.twice = False


def json_array(path: Path, file: io.BufferedReader, encoding: str | None, bad: BadRow) -> Iterator[Row]:
    """Yield the rows of an array, without the whole in memory; see `read`."""
    objects = _Objects()
    with io.TextIOWrapper(file, encoding_of(file, encoding)) as text:
        for line, value in _elements(path, text, objects.decoder):
            place = f"{path}:{line}"
            if wrong := objects.check(place, value):
                bad(UserError(wrong))
            else:
                yield Row(place, value, None)


def _elements(path: Path, text: io.TextIOWrapper, decoder: json.JSONDecoder) -> Iterator[tuple[int, Any]]:
    """Yield the elements of a JSON array with the line where each begins, without the whole in memory."""
    rest, at, line, counted = "", 0, 1, 0

    def fill() -> bool:
        nonlocal rest, at, counted
        if len(rest) - at > LINE_LIMIT:
            raise UserError(
                f"{path}:{line}: the row is longer than {LINE_LIMIT >> 20} MiB; fix or shorten it"
            )
        try:
            more = text.read(max(_CHUNK, len(rest) - at))
        except UnicodeError:
            raise UserError(
                f"{path}: not {text.encoding.upper()} after line {line}; save it as UTF-8"
            ) from None
        rest, at, counted = rest[at:] + more, 0, counted - at
        return bool(more)

    def wrong(what: str) -> UserError:
        return UserError(f"{path}:{line}: not a JSON array: {what}; fix it, or write one object per line")

    expected = "["
    while True:
        at = _BLANK.match(rest, at).end()  # type: ignore[union-attr]
        line += rest.count("\n", counted, at)
        counted = at
        if at == len(rest):
            if not fill():
                raise wrong("it does not end with ]")
        elif rest[at] == "]" and expected != "[":
            break
        elif expected:
            if rest[at] != expected:
                raise wrong(f"{expected} is missing")
            expected, at = "", at + 1
        else:
            try:
                value, end = decoder.raw_decode(rest, at)
            except (ValueError, RecursionError) as error:
                if isinstance(error, json.JSONDecodeError) and fill():
                    continue
                what = "its syntax is wrong" if isinstance(error, json.JSONDecodeError) else fault_of(error)
                raise wrong(what) from None
            if end == len(rest) and fill():  # a number may go on
                continue
            yield line, value
            at, expected = end, ","
    if rest[at + 1 :].strip() or text.read(_CHUNK).strip():
        raise wrong("something follows it")
