# SPDX-License-Identifier: Apache-2.0
"""Rows of Parquet and Arrow files, a record batch at a time."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..base import UserError, given_twice
from .row import Row

_BATCH = 2**26
"""Bytes of a table that are turned into rows together."""


def table_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a Parquet or Arrow file; `batches` says what is raised."""
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
            rows = max(1, min(1024, _BATCH * batch.num_rows // max(1, batch.nbytes)))
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
