"""The rows of a node's data files: JSON lines, CSV (both also gzipped) and Parquet."""

import csv
import gzip
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from fedpipe_api.base import UserError
from fedpipe_api.job import DataSource

Row = dict[str, Any]

_SUFFIXES = {".jsonl": "jsonl", ".json": "jsonl", ".csv": "csv", ".parquet": "parquet"}


def locate(directory: Path, source: DataSource) -> tuple[Path, Path | None]:
    """Return the train and evaluation files of a node.

    Raises:
        UserError: a file is missing or empty.
    """
    train = _existing(directory / source.train, "spec.data.train")
    evaluation = None
    if source.evaluation:
        evaluation = _existing(directory / source.evaluation, "spec.data.evaluation")
    return train, evaluation


def _existing(path: Path, field: str) -> Path:
    if not path.is_file():
        raise UserError(f"{path}: no such file; put the node's data there or correct {field}")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty; {field} needs at least one row")
    return path


def read(path: Path, form: str | None) -> Iterator[tuple[str, Row]]:
    """Yield each row with its place, `file:line` (`file:row` for Parquet).

    Raises:
        UserError: the format is unknown or a row is not readable; the message names the place.
    """
    plain = path.with_suffix("") if path.suffix == ".gz" else path
    form = form or _SUFFIXES.get(plain.suffix.lower())
    if form is None:
        raise UserError(f"{path}: unknown suffix; name it .jsonl, .csv or .parquet, or set spec.data.format")
    try:
        if form == "parquet":
            yield from _parquet(path)
        else:
            lines = _json_lines if form == "jsonl" else _csv
            with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
                yield from lines(path, cast(IO[bytes], file))
    except OSError as error:  # gzip's own have no number, and quote the file's first bytes
        why = os.strerror(error.errno) if isinstance(error.errno, int) else "not a whole gzip file"
        raise UserError(f"{path}: cannot be read: {why}") from None
    except (EOFError, zlib.error):
        raise UserError(f"{path}: cannot be read: not a whole gzip file") from None


def _json_lines(path: Path, file: IO[bytes]) -> Iterator[tuple[str, Row]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            what = f"{path}:{number}: not a JSON object: {_fault(error)}"
            raise UserError(f"{what}; fix or remove the line") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: not a JSON object; write one {{...}} per line")
        yield f"{path}:{number}", row


def _csv(path: Path, file: IO[bytes]) -> Iterator[tuple[str, Row]]:
    reader = csv.DictReader(_text_lines(file), strict=True)
    while True:
        try:
            row = next(reader, None)
        except (csv.Error, UnicodeDecodeError) as error:
            what = f"{path}:{reader.line_num + 1}: not CSV: {_fault(error)}"
            raise UserError(f"{what}; fix or remove the row") from None
        if row is None:
            return
        yield f"{path}:{reader.line_num}", row


def _text_lines(file: IO[bytes]) -> Iterator[str]:
    """Yield lines of text one by one, so that bytes that are not UTF-8 are found in theirs."""
    encoding = "utf-8-sig"
    for some in file:
        for line in some.splitlines(keepends=True):  # a file may end its lines with \r alone
            yield line.decode(encoding)
            encoding = "utf-8"


def _parquet(path: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}:{number}", row
    # Values that Python cannot hold are ValueError or OverflowError; a damaged page may be any of them.
    except (pyarrow.ArrowException, ValueError, OverflowError, OSError):
        where = f"; the fault is after row {number}" if number else ""
        raise UserError(f"{path}: not a readable Parquet file{where}") from None


def _fault(error: Exception) -> str:
    """Return what is wrong with a line, without the words of the error: they quote bytes of the data."""
    match error:
        case json.JSONDecodeError():
            return f"its syntax is wrong at column {error.colno}"
        case UnicodeDecodeError():
            return f"byte {error.start + 1} is not UTF-8"
        case RecursionError():
            return "it is nested too deep"
        case csv.Error() if "field limit" in str(error):
            return f"a field is longer than {csv.field_size_limit()} characters"
        case csv.Error():
            return "its quotes or line ends are wrong"
    return "a number is too long"
