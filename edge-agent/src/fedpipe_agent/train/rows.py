"""The rows of a node's data files: JSON lines, CSV (both also gzipped) and Parquet."""

import csv
import gzip
import io
import json
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
    except (OSError, EOFError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


def _json_lines(path: Path, file: IO[bytes]) -> Iterator[tuple[str, Row]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:  # bad JSON or bad UTF-8
            raise UserError(f"{path}:{number}: not a JSON object: {error}; mend or remove the line") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: not a JSON object; write one {{...}} per line")
        yield f"{path}:{number}", row


def _csv(path: Path, file: IO[bytes]) -> Iterator[tuple[str, Row]]:
    with io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, strict=True)
        while True:
            try:
                row = next(reader, None)
            except (csv.Error, UnicodeDecodeError) as error:
                place = f"{path}:{reader.line_num + 1}"
                raise UserError(f"{place}: not CSV: {error}; mend or remove the row") from None
            if row is None:
                return
            yield f"{path}:{reader.line_num}", row


def _parquet(path: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}:{number}", row
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path}: not a Parquet file: {error}") from None
