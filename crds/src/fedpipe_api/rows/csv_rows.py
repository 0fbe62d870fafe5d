# SPDX-License-Identifier: Apache-2.0
"""Rows of CSV: the delimiter is found in the header, the encoding by `text_encoding`."""

import csv
import logging
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from ..base import UserError, given_twice
from .row import BadRow, Row, fail, fault_of
from .text_encoding import LINE_LIMIT, Lines

log = logging.getLogger(__name__)

_DELIMITERS = ",;\t|"


def csv_rows(path: Path, lines: Lines, bad: BadRow) -> Iterator[Row]:
    """Yield the rows of CSV with a header; see `read`."""
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
            fault = fault_of(error)
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
