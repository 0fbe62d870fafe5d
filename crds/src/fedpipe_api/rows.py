"""The rows of data files: JSON lines and CSV (both also gzipped), and Parquet; one reader for all of us.

No message quotes a value: a mistake is named by its file and line.
"""

import csv
import gzip
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from .base import UserError
from .job import DataSource

_SUFFIXES = {".jsonl": "jsonl", ".json": "jsonl", ".csv": "csv", ".parquet": "parquet"}


class Row(NamedTuple):
    """One row.

    `place` is `file:line`, `file:row` for Parquet; `source` the line of JSON without its end, the cells of
    CSV, None for Parquet.
    """

    place: str
    fields: dict[str, Any]
    source: bytes | list[str] | None


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


def form_of(path: Path, form: str | None = None) -> str:
    """Return the format, `jsonl`, `csv` or `parquet`: the given one, else by the suffix.

    Raises:
        UserError: the suffix is unknown.
    """
    plain = path.with_suffix("") if path.suffix == ".gz" else path
    found = form or _SUFFIXES.get(plain.suffix.lower())
    if found is None:
        raise UserError(f"{path}: unknown suffix; name it .jsonl, .csv or .parquet, or set spec.data.format")
    return found


def read(path: Path, form: str | None = None) -> Iterator[Row]:
    """Yield each row.

    Raises:
        UserError: the format is unknown or a row is not readable; the message names the place.
    """
    form = form_of(path, form)
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


def _json_lines(path: Path, file: IO[bytes]) -> Iterator[Row]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            what = f"{place}: not a JSON object: {_fault(error)}"
            raise UserError(f"{what}; fix or remove the line") from None
        if not isinstance(row, dict):
            raise UserError(f"{place}: not a JSON object; write one {{...}} per line")
        yield Row(place, row, line.rstrip(b"\r\n"))


def _csv(path: Path, file: IO[bytes]) -> Iterator[Row]:
    reader = csv.reader(_text_lines(file), strict=True)
    names: list[str] | None = None
    while True:
        try:
            cells = next(reader, None)
        except (csv.Error, UnicodeDecodeError) as error:
            # Text that cannot be decoded did not reach the reader, which counts lines.
            number = reader.line_num + isinstance(error, UnicodeDecodeError)
            what = f"{path}:{number}: not CSV: {_fault(error)}"
            raise UserError(f"{what}; fix or remove the row") from None
        if cells is None:
            return
        if not cells:  # an empty line
            continue
        place = f"{path}:{reader.line_num}"
        if names is None:
            names = cells
            if len(set(names)) < len(names):
                raise UserError(f"{place}: two columns have the same name; rename one")
            continue
        if len(cells) != len(names):
            columns = f"{len(cells)} columns, but the header has {len(names)}"
            raise UserError(f"{place}: {columns}; fix or remove the row")
        yield Row(place, dict(zip(names, cells, strict=True)), cells)


def _text_lines(file: IO[bytes]) -> Iterator[str]:
    """Yield lines of text one by one, so that bytes that are not UTF-8 are found in theirs."""
    encoding = "utf-8-sig"
    for some in file:
        for line in some.splitlines(keepends=True):  # a file may end its lines with \r alone
            yield line.decode(encoding)
            encoding = "utf-8"


def _parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: Parquet needs pyarrow; pip install pyarrow") from None
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield Row(f"{path}:{number}", row, None)
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
