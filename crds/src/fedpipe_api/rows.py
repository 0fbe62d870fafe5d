# SPDX-License-Identifier: Apache-2.0
"""The rows of data files: JSON (lines or an array), CSV, Parquet and Arrow; one reader for all of us.

No message quotes a value: a mistake is named by its file and line.
"""

import csv
import io
import json
import logging
import os
import re
import zlib
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from .base import UserError, given_twice
from .data_files import form_of, opened
from .text_lines import LINE_LIMIT, Lines, encoding_of

log = logging.getLogger(__name__)

_DELIMITERS = ",;\t|"
_CHUNK = 2**20
"""Characters of a JSON array, and (times 64) bytes of a table, that are read together."""
_BLANK = re.compile(r"[ \t\r\n]*")
BadRow = Callable[[UserError], None]
"""Called with what is wrong with one row; returns where the others are to be read."""


class Row(NamedTuple):
    """One row.

    `place` is `file:line`, `file:row` of a table; `source` the line of JSON without its end, the cells of
    CSV, None of a table or an array.
    """

    place: str
    fields: dict[str, Any]
    source: str | list[str] | None


def fail(error: UserError) -> None:
    """Raise what is wrong with a row."""
    raise error


def read(
    path: Path, form: str | None = None, encoding: str | None = None, bad: BadRow = fail
) -> Iterator[Row]:
    """Yield each row of a file, in memory of a few rows.

    Args:
        path: of the file.
        form: of the file, by default by its suffix.
        encoding: of its text, by default Unicode's, and for CSV also others that are plain to see.
        bad: called with what is wrong with a row.

    Raises:
        UserError: the format is unknown or the file is not readable; the message names the place.
    """
    form = form_of(path, form)
    try:
        if form in ("parquet", "arrow"):
            yield from _table(path)
            return
        with opened(path) as file:
            if form == "csv":
                yield from _csv(path, Lines(path, file, encoding, guess=True), bad)
            elif file.peek(64).replace(b"\0", b"").lstrip(b"\xef\xbb\xbf\xff\xfe \t\r\n").startswith(b"["):
                yield from _json_array(path, file, encoding, bad)
            else:
                yield from _json_lines(path, Lines(path, file, encoding), bad)
    except (EOFError, zlib.error):
        raise UserError(f"{path}: cannot be read: not a whole gzip file") from None
    except OSError as error:  # those of decompression have no number, and quote the file's first bytes
        kind = "zstd" if path.suffix.lower() == ".zst" else "gzip"
        why = os.strerror(error.errno) if isinstance(error.errno, int) else f"not a whole {kind} file"
        raise UserError(f"{path}: cannot be read: {why}") from None


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


def _json_lines(path: Path, lines: Lines, bad: BadRow) -> Iterator[Row]:
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
                fault = _fault(error)
        if fault:
            bad(UserError(f"{place}: not a JSON object: {fault}; fix or remove the line"))
        elif wrong := objects.check(place, row):
            bad(UserError(wrong))
        else:
            yield Row(place, row, text)
            continue
        objects.twice = False


def _json_array(path: Path, file: io.BufferedReader, encoding: str | None, bad: BadRow) -> Iterator[Row]:
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
                what = "its syntax is wrong" if isinstance(error, json.JSONDecodeError) else _fault(error)
                raise wrong(what) from None
            if end == len(rest) and fill():  # a number may go on
                continue
            yield line, value
            at, expected = end, ","
    if rest[at + 1 :].strip() or text.read(_CHUNK).strip():
        raise wrong("something follows it")


def _csv(path: Path, lines: Lines, bad: BadRow) -> Iterator[Row]:
    csv.field_size_limit(LINE_LIMIT)
    text = iter(lines)
    first = next((line for line in text if line.strip()), "")
    delimiter = _delimiter(first)
    start = lines.number
    reader = csv.reader(chain([first], text), delimiter=delimiter, strict=True)
    names: list[str] | None = None
    while True:
        place = f"{path}:{start}"
        cells: list[str] | None = []
        fault = None
        try:
            cells = next(reader, None)
        except csv.Error as error:
            fault = _fault(error)
        fault, lines.fault = lines.fault or fault, None
        several, start = lines.number > start, lines.number + 1
        if cells is None:
            break
        if fault or (delimiter == "\t" and any("\t" in cell and "\n" in cell for cell in cells)):
            what = f"{place}: not CSV: {fault or 'a quote is not closed in its line'}; fix or remove the row"
            # Where a quote was not closed, nobody knows how many rows were taken for one.
            (fail if several or names is None else bad)(UserError(what))
        elif not cells:  # an empty line
            continue
        elif names is None:
            names = [cell.strip() for cell in cells]
            if given_twice(names) is not None:
                raise UserError(f"{place}: two columns have the same name; rename one")
        elif len(cells) != len(names):
            columns = f"{len(cells)} columns, but the header has {len(names)}"
            bad(UserError(f"{place}: {columns}; fix or remove the row"))
        else:
            yield Row(place, dict(zip(names, cells, strict=True)), cells)
    if lines.guessed:
        log.warning("%s: not UTF-8; read as %s, which is a guess: save it as UTF-8", path, lines.guessed)


def _delimiter(header: str) -> str:
    """Return what separates most names of the header."""
    return max(_DELIMITERS, key=lambda sign: len(next(csv.reader([header], delimiter=sign), [])))


def _table(path: Path) -> Iterator[Row]:
    number = 0
    for batch in batches(path):
        names = _class_names(batch.schema.metadata or {})
        try:
            rows = batch.to_pylist()
        except (ValueError, OverflowError):  # values that Python cannot hold
            raise _unreadable(path, number) from None
        for row in rows:
            number += 1
            for column, classes in names.items():
                if isinstance(index := row.get(column), int) and 0 <= index < len(classes):
                    row[column] = classes[index]
            yield Row(f"{path}:{number}", row, None)


def batches(path: Path) -> Iterator[Any]:
    """Yield the record batches of a Parquet or Arrow file, in pieces of about 64 MiB as far as rows allow.

    Raises:
        UserError: it is not readable, or two columns have the same name.
    """
    try:
        import pyarrow
    except ImportError:
        raise UserError(f"{path}: Parquet and Arrow need pyarrow; pip install pyarrow") from None
    number = 0
    try:
        for batch in _batches(path):
            if not number and given_twice(batch.schema.names) is not None:
                raise UserError(f"{path}: two columns have the same name; rename one")
            rows = max(1, min(1024, 64 * _CHUNK * batch.num_rows // max(1, batch.nbytes)))
            for start in range(0, batch.num_rows, rows):
                yield batch.slice(start, rows)
            number += batch.num_rows
    # A damaged page may be any of them.
    except (pyarrow.ArrowException, ValueError, OverflowError, OSError):
        raise _unreadable(path, number) from None


def _unreadable(path: Path, number: int) -> UserError:
    where = f"; the fault is after row {number}" if number else ""
    return UserError(f"{path}: not a readable Parquet or Arrow file{where}")


def _batches(path: Path) -> Iterator[Any]:
    import pyarrow
    import pyarrow.ipc
    import pyarrow.parquet

    with path.open("rb") as file:
        magic = file.read(4)
    if magic == b"PAR1":
        with pyarrow.parquet.ParquetFile(path) as table:
            yield from table.iter_batches(batch_size=1024)
        return
    with pyarrow.memory_map(str(path)) as source:
        if magic == b"ARRO":
            reader = pyarrow.ipc.open_file(source)
            yield from map(reader.get_batch, range(reader.num_record_batches))
        else:
            yield from pyarrow.ipc.open_stream(source)


def _class_names(metadata: dict[bytes, bytes]) -> dict[str, list[str]]:
    """Return the class names that the library datasets keeps beside a column of their indices."""
    try:
        columns = json.loads(metadata[b"huggingface"])["info"]["features"].items()
        found = {column: kind["names"] for column, kind in columns if kind.get("_type") == "ClassLabel"}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return {}
    return {
        column: names
        for column, names in found.items()
        if isinstance(names, list) and all(isinstance(name, str) for name in names)
    }


def _fault(error: Exception) -> str:
    """Return what is wrong with a line, without the words of the error: they quote bytes of the data."""
    match error:
        case json.JSONDecodeError():
            return f"its syntax is wrong at column {error.colno}"
        case RecursionError():
            return "it is nested too deep"
        case csv.Error() if "field limit" in str(error):
            return f"a field is longer than {csv.field_size_limit()} characters"
        case csv.Error():
            return "its quotes or line ends are wrong"
    return "a number is too long"
