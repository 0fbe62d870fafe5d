# SPDX-License-Identifier: Apache-2.0
"""The rows of data files: JSON (lines or an array), CSV, Parquet and Arrow; one reader for all of us.

No message quotes a value: a mistake is named by its file and line.
"""

import os
import zlib
from collections.abc import Iterator
from pathlib import Path

from ..base import UserError
from .csv_rows import csv_rows
from .data_paths import form_of, opened
from .json_rows import json_array, json_lines
from .row import BadRow, Row, fail
from .table_rows import batches, table_rows
from .text_encoding import Lines

__all__ = ["BadRow", "Row", "batches", "fail", "read"]


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
            yield from table_rows(path)
            return
        with opened(path) as file:
            if form == "csv":
                yield from csv_rows(path, Lines(path, file, encoding, guess=True), bad)
            elif file.peek(64).replace(b"\0", b"").lstrip(b"\xef\xbb\xbf\xff\xfe \t\r\n").startswith(b"["):
                yield from json_array(path, file, encoding, bad)
            else:
                yield from json_lines(path, Lines(path, file, encoding), bad)
    except (EOFError, zlib.error):
        raise UserError(f"{path}: cannot be read: not a whole gzip file") from None
    except OSError as error:  # those of decompression have no number, and quote the file's first bytes
        kind = "zstd" if path.suffix.lower() == ".zst" else "gzip"
        why = os.strerror(error.errno) if isinstance(error.errno, int) else f"not a whole {kind} file"
        raise UserError(f"{path}: cannot be read: {why}") from None
